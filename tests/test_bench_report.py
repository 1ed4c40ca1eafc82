"""The page and the terminal of a bench, on made-up results: whole, partial, wrong and hostile ones."""

from __future__ import annotations

import copy
import io

import pytest
from rich.console import Console

from everlong.bench import claims
from everlong.report import bench, html
from everlong.report.bench_page import headline, notice, render
from everlong.report.bench_plots import figures, looks, names
from everlong.report.bench_tables import details, ratio, tables
from test_report import HOSTILE, Page

LIMITS = {
    "read_gbs": 47.3,
    "read_by": "torch.sum of int64",
    "copy_gbs": 41.2,
    "matmul_fp32_gflops": 112.0,
    "matmul_bf16_gflops": 655.0,
}
FORMATS = {"fp32": ("fp32", "f32"), "bf16": ("bf16", "f16"), "int8": (None, "Q8_0"), "int4": (None, "Q4_0")}
SPEEDS = {"fp32": 80.0, "bf16": 140.0, "int8": 250.0, "int4": 330.0}  # tokens/s of ours


def spread(middle, rounds=9):
    return {"min": 0.93 * middle, "median": middle, "max": 1.08 * middle, "rounds": rounds}


def timed(**fields):
    return {"status": "timed", "reason": None, "error": 3e-6, **fields}


def engines(weights):
    """Ours and the peers' in a format, with how many times slower they are."""
    theirs, llama = FORMATS[weights]
    found = [("everlong", weights, 1.0), ("llama.cpp", llama, 1.7)]
    return found + ([("transformers", theirs, 4.2)] if theirs else [])


def model_rows(model):
    rows = []
    for weights, speed in SPEEDS.items():
        who = engines(weights)
        faster = {f"{engine} {form}": spread(slower) for engine, form, slower in who[1:]}
        for engine, form, slower in who:
            about = {"model": model, "engine": engine, "weights": form}
            ours = {"ratios": faster} if engine == "everlong" else {}
            for length in (512, 2048, 8192):
                rate = 15 * speed / slower
                figure = {"seconds": spread(length / rate), "tokens_per_second": spread(rate)}
                rows.append(timed(measure="prefill", **about, length=length, batch=1, **figure, **ours))
            for context in (512, 8192):
                rate = speed / slower
                tails = {"p50": 1000 / rate, "p99": 1200 / rate, "p999": 1900 / rate, "units": 2000}
                figure = {"tokens_per_second": spread(rate), "latency_ms": tails}
                beside = {"gbs": spread(38.0), "share_of_read": spread(0.82)} if ours else {}
                rows.append(timed(measure="decode", **about, context=context, batch=1, **figure, **beside, **ours))
        for size in (1, 4, 16):
            about = {"measure": "batch", "model": model, "engine": "everlong", "weights": weights, "batch": size}
            tails = {"p50": 9.0, "p99": 11.0, "p999": None, "units": 200}
            figure = {"tokens_per_second": spread(speed * size**0.7), "latency_ms": tails, "scaling": spread(size**0.7)}
            rows.append(timed(**about, context=512, **figure))
    memory = {"measure": "memory", "model": model, "engine": "everlong", "weights": "fp32"}
    return rows + [timed(**memory, length=n, peak_bytes=900 * 2**20 + n) for n in (10_000, 100_000, 1_000_000)]


def training_rows():
    rows = []
    speeds = {"mamba": 9000, "mamba2": 8000, "rwkv7": 6500, "griffin": 7000}
    faster = {f"transformers {name} fp32": spread(2.0) for name in ("llama", "mamba")}
    for weights, gain in (("fp32", 1.0), ("bf16", 1.6)):
        for name, speed in speeds.items():
            about = {"measure": "training", "model": name, "engine": "everlong", "weights": weights}
            beside = {"against_fp32": spread(gain)} if weights == "bf16" else {}
            rows.append(timed(**about, tokens_per_second=spread(speed * gain), ratios=faster, **beside))
        for name, speed in (("llama", 3700), ("mamba", 23)):
            about = {"measure": "training", "model": name, "engine": "transformers", "weights": weights}
            rows.append(timed(**about, tokens_per_second=spread(speed, 1)))
    loss = {"measure": "loss", "model": "width 64", "engine": "everlong", "weights": "fp32", "length": 8192}
    return [*rows, timed(**loss, taken_bytes=2**28, logits_bytes=2**31)]


def op_rows():
    rows = []
    for op, variant in (
        ("selective_scan", "D"),
        ("selective_scan", "no D"),
        ("delta_rule", "key"),
        ("lstm_scan", None),
    ):
        for dtype in ("fp32", "bf16"):
            for name, cost in (("forward", 1.0), ("forward+backward", 3.0)):
                times = {"native": 8.0, "torch": 30.0, "reference": 500.0}
                for form, ms in times.items():
                    about = {"op": op, "variant": variant, "case": "mamba-130m", "batch": 1, "time": 2048}
                    against = {other: spread(times[other] / ms) for other in times if other != form}
                    figure = {"ms": spread(cost * ms), "gflops": 400 / ms, "gbs": 60 / ms, "against": against}
                    rows.append(timed(**about, dtype=dtype, backend=form, **{"pass": name}, **figure))
    return rows


def made_up(kind):
    rows = op_rows() if kind == "ops" else [*model_rows("mamba-130m"), *model_rows("rwkv7-0.1b"), *training_rows()]
    return {
        "version": 1,
        "kind": kind,
        "created": "2031-02-03T04:05:06Z",
        "command": f"everlong bench {kind} --seconds 5",
        "complete": True,
        "machine": {"cpu": "Imaginary CPU @ 3.00GHz", "cores": 2, "threads": 2, "torch": "2.13.0"},
        "settings": {"seconds of a comparison": 5.0, "training": "width 256"},
        "limits": LIMITS,
        "skipped": [],
        "failed": [],
        "rows": rows,
        "lines": claims.lines(kind, rows),
    }


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(html, "_plotly", lambda: "/* plotly */")
    return lambda results: Page(render(results))


def said(results, width=160):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    bench.show(results, console)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["ops", "models"])
def test_page_has_every_plot_and_table(page, kind):
    results = made_up(kind)
    seen = page(results)
    assert {"claims", "limits", "plots", "made", *(f"t-{table.key}" for table in tables(results))} <= seen.ids
    assert {f"p-{figure['key']}" for figure in figures(results)} <= seen.ids
    assert seen.data["looks"].keys() == names(results).keys() and "Partial results" not in seen.text
    for words in ("Imaginary CPU", f"everlong bench {kind} --seconds 5", "47.3 GB/s", "655 GFLOP/s", "2031-02-03"):
        assert words in seen.text
    assert ("forms" in seen.ids) == (kind == "ops")


def test_every_engine_has_its_own_look():
    for kind in ("ops", "models"):
        pairs = [(look["light"], look["marker"]) for look in looks(made_up(kind)).values()]
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("kind", ["ops", "models"])
def test_a_mismatch_is_red_with_its_error_and_no_time(page, kind):
    results = made_up(kind)
    wrong = next(row for row in results["rows"] if row.get("backend") == "native" or row.get("engine") == "llama.cpp")
    kept = {key: value for key, value in wrong.items() if key not in ("ms", "against", "seconds", "tokens_per_second")}
    results["rows"] = [
        {**kept, "status": "mismatch", "reason": "output 0: relative error 2.0e-01, allowed 2e-04", "error": 0.2}
        if row is wrong
        else row
        for row in results["rows"]
    ]
    seen = page(results)
    assert len([1 for tag, attrs in seen.elements if tag == "tr" and attrs.get("class") == "bad"]) >= 1
    assert "relative error 2.0e-01" in seen.text and "1 not timed because it does not match" in seen.text
    told = said(results)
    assert "relative error 2.0e-01, allowed 2e-04" in told and "1 not timed because it does not match" in told
    marked = [line for table in tables(results) + details(results) for line in table.lines if line.bad]
    assert marked and all("relative error" in line.note for line in marked)


def test_partial_results_say_what_is_missing(page):
    results = made_up("models")
    results.update(skipped=["rwkv7-0.1b int4, batches"], failed=[{"label": "training", "reason": "RuntimeError: full"}])
    assert notice(results) == "training failed: RuntimeError: full. no time was left for rwkv7-0.1b int4, batches"
    assert "Partial results" in page(results).text and "no time was left for rwkv7-0.1b int4, batches" in said(results)


def test_nothing_timed_is_a_page_too(page):
    for kind in ("ops", "models"):
        results = {**made_up(kind), "rows": [], "lines": [], "limits": {}}
        assert "Nothing was timed" in page(results).text and headline(results) == "0 rows timed."
        assert said(results)


def test_hostile_text_stays_text(page):
    results = copy.deepcopy(made_up("models"))
    for row in results["rows"]:
        row["model"] = HOSTILE.encode("utf-8", "replace").decode()
    results["command"] = HOSTILE.encode("utf-8", "replace").decode()
    seen = page(results)
    assert [tag for tag, _ in seen.elements].count("script") == 4 and "<script>" not in seen.raw


def test_terminal_tables_fit_their_widths():
    for kind in ("ops", "models"):
        for width in (80, 120, 200):
            assert (
                max(len(line) for line in said(made_up(kind), width).splitlines() if "│" in line or "─" in line)
                <= width
            )
    told = said(made_up("models"))
    assert "holds  mamba-130m prefill 2048, bf16" not in told and "fails  mamba-130m prefill 2048, bf16" in told
    lines = made_up("models")["lines"]
    assert f"{sum(line['holds'] for line in lines)} of {len(lines)} goals hold" in told


def test_ranges():
    assert ratio(None) == "–" and ratio(spread(2.0, 1)) == "2x" and ratio(spread(2.0)) == "2x (1.86 to 2.16)"


def test_a_mismatch_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "_plotly", lambda: "")
    results = made_up("ops")
    monkeypatch.setitem(bench.RUNS, "ops", lambda plan, terms, watch: results)
    quiet = Console(file=io.StringIO())
    assert bench.bench("ops", None, bench.Terms(tmp_path), quiet)
    results["rows"][0] = {**results["rows"][0], "status": "mismatch", "reason": "wrong"}
    assert not bench.bench("ops", None, bench.Terms(tmp_path), quiet)
    assert (tmp_path / "report.html").is_file() and "At most 30 minutes" in quiet.file.getvalue()
