"""The report: JSON first; page and terminal summary are drawn from it."""

from zsq_deploy.report.build import (
    accuracy_section,
    environment_section,
    file_section,
    finish,
    integer_section,
    latency_section,
    layers_section,
    parity_section,
    verdict_section,
)
from zsq_deploy.report.html import render as render_html
from zsq_deploy.report.html import write as write_html
from zsq_deploy.report.preview import contact_sheet
from zsq_deploy.report.schema import SCHEMA_VERSION, Report, json_schema, load, parse, save
from zsq_deploy.report.text import summary

__all__ = [
    "SCHEMA_VERSION",
    "Report",
    "accuracy_section",
    "contact_sheet",
    "environment_section",
    "file_section",
    "finish",
    "integer_section",
    "json_schema",
    "latency_section",
    "layers_section",
    "load",
    "parity_section",
    "parse",
    "render_html",
    "save",
    "summary",
    "verdict_section",
    "write_html",
]
