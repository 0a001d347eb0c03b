"""The most important figures of a target: as cards for the page, and in one sentence."""

from __future__ import annotations

from typing import Any

from zsq_deploy.report import words
from zsq_deploy.report.parity_schema import AccuracySection
from zsq_deploy.report.schema import Report, TargetSection

__all__ = ["cards", "sentence"]


def _card(
    title: str, figure: str, unit: str, detail: str, *, tone: str = "", badge: str = "", meter: float | None = None
) -> dict[str, Any]:
    return {
        "title": title,
        "figure": figure,
        "unit": unit,
        "detail": detail,
        "tone": tone,
        "badge": badge,
        "meter": None if meter is None else max(0.0, min(1.0, meter)),
    }


def _speed_card(target: TargetSection) -> dict[str, Any]:
    latency = target.latency
    if latency.speedup is None or latency.engine is None or latency.float32 is None:
        why = target.not_measured.get("latency", "not measured")
        return _card("Speed", words.NOTHING, "", why)
    ratio = latency.speedup
    detail = (
        f"{words.milliseconds(latency.engine.median_ms)} instead of {words.milliseconds(latency.float32.median_ms)}"
    )
    if latency.speedup_over_best is not None and latency.float_best and latency.float_best != latency.float32:
        detail += f"; {words.times(latency.speedup_over_best)} the best float mode"
    if latency.engine.threads:
        detail += f"; {latency.engine.threads} thread" + ("s" if latency.engine.threads > 1 else "")
    unit = "as fast as fp32" if ratio >= 1 else "as fast as fp32: slower"
    return _card("Speed", words.times(ratio), unit, detail, tone="" if ratio >= 1 else "bad")


def _size_card(target: TargetSection) -> dict[str, Any]:
    engine = target.engine.bytes
    if target.float_model is None or not engine:
        return _card("Size", words.bytes_text(engine), "", "the float file was not measured")
    ratio = target.float_model.bytes / engine
    detail = f"{words.bytes_text(engine)} instead of {words.bytes_text(target.float_model.bytes)}"
    unit = "smaller" if ratio >= 1 else "larger"
    return _card(
        "Size", words.times(ratio if ratio >= 1 else 1 / ratio), unit, detail, tone="" if ratio >= 1 else "bad"
    )


def _quality_card(accuracy: AccuracySection | None, why: str) -> dict[str, Any]:
    if accuracy is None or accuracy.engine is None:
        return _card("Accuracy", words.NOTHING, "", why or "no evaluation data")
    shown = words.quality(accuracy.engine, accuracy.metric)
    images = f"{words.count(accuracy.images)} images"
    if accuracy.metric == "agreement_with_float":
        detail = f"of {images} get the class that float gives; no labels were given"
        return _card("Agreement with float", shown, "", detail, badge="estimate", meter=accuracy.engine)
    if accuracy.metric == "sqnr_db":
        return _card("Output SQNR", shown, "", f"against float, on {images}", badge="estimate")
    if accuracy.float_ is None:
        return _card("Accuracy", shown, "", images)
    if accuracy.metric == "psnr_db":
        detail = f"float {words.decibel(accuracy.float_)}; {images}"
        difference = f"{accuracy.engine - accuracy.float_:+.2f}".replace("-", "−")
        return _card("PSNR", shown, f"{difference}\u00a0dB", detail)
    change = accuracy.engine - accuracy.float_
    detail = f"float {words.percent(accuracy.float_)}; {images}"
    paired = accuracy.paired.get("engine")
    if paired is not None:
        detail += f"; standard error of the difference {100 * paired.standard_error:.2f} points"
    tone = "bad" if change < -0.02 else ""
    return _card("Accuracy", shown, words.points(change), detail, tone=tone, meter=accuracy.engine)


def _integer_card(target: TargetSection) -> dict[str, Any]:
    integer = target.integer
    if integer.macs_share is None:
        return _card("Integer arithmetic", words.NOTHING, "", target.not_measured.get("integer", "not measured"))
    islands = sum(1 for island in integer.float_islands if island.macs)
    detail = f"{words.percent(integer.time_share, 1)} of kernel time" if integer.time_share is not None else ""
    if islands:
        detail += f"; {islands} matrix or convolution {'node' if islands == 1 else 'nodes'} in float"
    share = integer.macs_share
    return _card(
        "Integer arithmetic",
        words.percent(share),
        "of multiply-accumulates",
        detail,
        tone="" if share == 1 else "bad" if share < 0.9 else "fair",
        meter=share,
    )


def _exact_card(target: TargetSection) -> dict[str, Any]:
    exact = target.parity.integer
    if exact is None or exact.equal_share is None:
        why = target.not_measured.get("parity.integer", "not compared with exact integer arithmetic")
        return _card("Bit for bit", words.NOTHING, "", why)
    detail = f"equal to exact integer arithmetic; {words.count(exact.elements)} outputs compared"
    if exact.max_lsb:
        detail += f"; largest difference {words.lsb(exact.max_lsb)} LSB"
    good = exact.equal_share >= 0.9999
    return _card(
        "Bit for bit",
        words.percent(exact.equal_share),
        "of outputs",
        detail,
        tone="" if good else "fair",
        meter=exact.equal_share,
    )


def _twin_card(target: TargetSection) -> dict[str, Any]:
    parity = target.parity
    if parity.within_2_lsb is None:
        why = target.not_measured.get("parity", "not compared with the fake-quant twin")
        return _card("As simulated", words.NOTHING, "", why)
    detail = f"within 2 LSB of the fake-quant simulation; largest {words.lsb(parity.max_lsb)} LSB"
    if parity.top1_agreement is not None:
        detail += f"; top-1 agreement {words.percent(parity.top1_agreement)}"
    good = parity.within_2_lsb >= 0.995
    return _card(
        "As simulated",
        words.percent(parity.within_2_lsb),
        "of outputs",
        detail,
        tone="" if good else "fair",
        meter=parity.within_2_lsb,
    )


def cards(target: TargetSection) -> list[dict[str, Any]]:
    """Speed, quality, size, and what the arithmetic is: title, figure, unit, detail, tone, badge and meter (a share, or ``None``)."""
    return [
        _speed_card(target),
        _quality_card(target.accuracy, target.not_measured.get("accuracy", "")),
        _size_card(target),
        _integer_card(target),
        _exact_card(target),
        _twin_card(target),
    ]


def sentence(report: Report, name: str, target: TargetSection, *, first: bool) -> str:
    """What happened, in one sentence; the network is named in the first one only."""
    gains = []
    if target.latency.speedup is not None:
        gains.append(f"{words.times(target.latency.speedup)} as fast as fp32")
    if target.float_model is not None and target.engine.bytes:
        ratio = target.float_model.bytes / target.engine.bytes
        gains.append(f"{words.times(ratio)} smaller" if ratio >= 1 else f"{words.times(1 / ratio)} larger")
    accuracy = target.accuracy
    if accuracy is not None and accuracy.engine is not None:
        shown = words.quality(accuracy.engine, accuracy.metric)
        if accuracy.metric == "agreement_with_float":
            gains.append(f"with float's decision on {shown} of the images (an estimate)")
        elif accuracy.metric == "sqnr_db":
            gains.append(f"with an output SQNR of {shown}")
        else:
            kind = "accuracy" if accuracy.metric == "top1" else "PSNR"
            gains.append(f"at {shown} {kind} (float: {words.quality(accuracy.float_, accuracy.metric)})")
    if first:
        return ", ".join([f"{report.model.name} runs on {name} as an integer engine", *gains]) + "."
    return f"On {name}: " + (", ".join(gains) or "an integer engine") + "."
