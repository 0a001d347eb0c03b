"""TensorRT's calibration caches: the format, the files, and two of them against each other.

The text of a cache is told in :mod:`zsq_deploy.backends.tensorrt.cache_format`, what it is bound to in
:mod:`zsq_deploy.backends.tensorrt.cache_files`.
"""

from __future__ import annotations

from zsq_deploy.backends.tensorrt.cache_comparison import (
    CacheComparison,
    ScaleDifference,
    compare_caches,
    compare_scales,
)
from zsq_deploy.backends.tensorrt.cache_files import (
    CacheBinding,
    binding_path,
    check_binding,
    read_cache,
    write_binding,
    write_cache,
)
from zsq_deploy.backends.tensorrt.cache_format import (
    ALGORITHMS,
    CalibrationCache,
    scale_bits,
    version_number,
    version_text,
)

__all__ = [
    "ALGORITHMS",
    "CacheBinding",
    "CacheComparison",
    "CalibrationCache",
    "ScaleDifference",
    "binding_path",
    "check_binding",
    "compare_caches",
    "compare_scales",
    "read_cache",
    "scale_bits",
    "version_number",
    "version_text",
    "write_binding",
    "write_cache",
]
