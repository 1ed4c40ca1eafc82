"""The report on made-up results: whole, partial and hostile ones."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from everlong.report import html
from everlong.report.measures import MEASURES, size
from everlong.report.plots import figures, looks
from everlong.report.terminal import Board, summary
from everlong.report.verdict import caveats, headline, verdict

CONTEXT = 256
# name, title, memory, bits per byte, drift beyond the context, capacity of recall, state bytes, tokens/s, ms per token
MADE_UP = [
    ("attention", "Attention", "linear", 2.411, 0.21, 64, 0, 21_400, 1.9),
    ("mamba", "Mamba", "constant", 2.302, -0.012, 12, 61_440, 11_900, 1.4),
    ("mamba2", "Mamba-2", "constant", 2.288, -0.015, 20, 198_656, 24_100, 1.1),
    ("rwkv7", "RWKV-7", "constant", 2.351, -0.008, 24, 101_376, 9_800, 1.6),
    ("griffin", "Griffin", "window", 2.377, 0.004, 16, 142_336, 22_900, 1.3),
    ("jamba", "Jamba", "linear", 2.262, 0.05, 48, 66_000, 23_500, 1.2),
]
EQUATIONS = {
    "attention": "y = softmax(q kᵀ / √K) v",
    "mamba": "h = exp(Δ A) h + Δ B x",
    "mamba2": "S = exp(Δ a) S + Δ x Bᵀ",
    "rwkv7": "S = S (diag(w) − κ̂ (a κ̂)ᵀ) + v kᵀ",
    "griffin": "h = a h + √(1 − a²) (i x)",
    "jamba": "S = exp(Δ a) S + Δ x Bᵀ, and attention",
}


def _grows(name: str, fixed: float, tokens: float) -> float:
    return {"attention": 3072 * tokens, "jamba": fixed + 1024 * tokens}.get(name, fixed)


def _slows(name: str, tokens: float) -> float:
    return {"attention": 1 + tokens / 2500, "jamba": 1 + tokens / 9000}.get(name, 1.0)


def made_up_model(row: tuple) -> dict:
    name, title, memory, bpb, drift, capacity, fixed, speed, latency = row
    tokens = [2**k * 1000 for k in range(11)]
    return {
        "name": name,
        "title": title,
        "layers": f"{name} + swiglu, x3",
        "equation": EQUATIONS[name],
        "memory": memory,
        "params": 812_000 + 4_000 * len(name),
        "status": "complete",
        "training": {
            "tokens": 786_432,
            "seconds": 786_432 / speed,
            "tokens_per_second": speed,
            "curve": [[4096 * i, bpb + 5.7 * math.exp(-i / 9) + 0.5 * math.exp(-i / 60)] for i in range(1, 193)],
        },
        "text": {
            "bits_per_byte": bpb,
            "by_position": [[16 * i + 8, bpb + 1.6 / (1 + i * (1.2 if drift > 0 else 1.0))] for i in range(16)],
            "by_length": [[CONTEXT * m, bpb + drift * math.log2(m) * (1 if drift > 0 else 0.5)] for m in (1, 2, 4, 8)],
        },
        "recall": {
            "chance": 1 / 64,
            "pairs": [[n, 1 / 64 + 0.98 / (1 + (n / capacity) ** 3)] for n in (4, 8, 16, 32, 64)],
            "train_tokens": 400_000,
            "train_pairs": 32,
            "finished": True,
        },
        "state_bytes": {
            "computed": [[t, _grows(name, fixed, t)] for t in [*tokens, 100_000]],
            "measured": [[t, _grows(name, fixed, t)] for t in (1000, 4000, 16_000)],
        },
        "prefill": [[t, 2.4 * speed / _slows(name, t)] for t in (256, 1024, 4096, 16_384)],
        "decode": [
            {"context": t, "p50_ms": latency * _slows(name, t), "p99_ms": latency * _slows(name, t) * 1.35}
            for t in (64, 1024, 4096, 16_384)
        ],
        "engine": {"in_python": 0, "blocks": 6},
        "load": 1.9,
        "samples": [
            {
                "prompt": "def read_csv(",
                "text": f"self, {title.lower()!r}):\n\t\tif x < 1 & y > 2:\n        return None\n",
            },
            {"prompt": "import os\nimport ", "text": "sys\nimport re\n\n\nclass Test(unittest.TestCase):\n" * 3},
        ],
    }


def made_up(*names: str) -> dict:
    """Results that no machine ever gave: smooth formulas around the numbers above."""
    chosen = [row for row in MADE_UP if not names or row[0] in names]
    return {
        "version": 1,
        "command": "everlong compare --quick",
        "created": "2031-02-03T04:05:06Z",
        "complete": True,
        "machine": {
            "cpu": "Imaginary CPU @ 3.00GHz",
            "cores": 2,
            "threads": 2,
            "memory_gib": 7.7,
            "system": "Linux 6.1",
            "python": "3.11.2",
            "torch": "2.13.0",
            "everlong": "0.1.0",
        },
        "settings": {
            "data": ["/usr/lib/python3.11"],
            "data_bytes": 31_457_280,
            "data_files": 1873,
            "train_tokens": 786_432,
            "context": CONTEXT,
            "batch": 16,
            "params": 800_000,
            "seed": 0,
            "quick": True,
            "optimizer": "AdamW, lr 0.002, betas (0.9, 0.95), weight decay 0.1, cosine to 0.1",
            "held_out_bytes": 262_144,
        },
        "models": [made_up_model(row) for row in chosen],
    }


HOSTILE = "</script ></script><script>alert(1)</script><!-- & <b>bold</b> \x00\x1b\ud800 \u2028 end"
SECTIONS = ("verdict", "summary", "plots", "models", "samples", "made")


class Page(HTMLParser):
    """What a browser would see: elements, ids, texts of scripts and of samples."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.ids: set[str] = set()
        self.scripts: list[tuple[dict, str]] = []
        self.said: list[str] = []
        self.inside: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        self.ids |= {found["id"]} if "id" in found else set()
        self.inside.append((tag, found))
        if tag == "script":
            self.scripts.append((found, ""))

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        where = [tag for tag, _ in self.inside]
        if where and where[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "style" not in where:
            self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.said))

    @property
    def raw(self) -> str:
        return next(text for attrs, text in self.scripts if attrs.get("id") == "data")

    @property
    def data(self) -> dict:
        return json.loads(self.raw)


@pytest.fixture
def page(monkeypatch):
    """Renders results, with a stand-in for plotly.js."""
    monkeypatch.setattr(html, "_plotly", lambda: "/* plotly */")
    return lambda results: Page(html.render(results))


def stripped(*keys: str) -> dict:
    """Made-up results without some blocks."""
    results = made_up()
    for model in results["models"]:
        for key in keys:
            model.pop(key)
    return results


def found(results: dict, key: str) -> dict:
    return next(finding for finding in verdict(results) if finding["key"] == key)


def test_page_has_every_section_plot_and_figure(page):
    seen = page(made_up())
    assert set(SECTIONS) <= seen.ids
    assert {
        f"p-{key}" for key in ("learning", "position", "length", "recall", "state", "prefill", "decode", "training")
    } <= seen.ids
    for words in (
        "Imaginary CPU",
        "everlong compare --quick",
        "2031-02-03 04:05 UTC",
        "AdamW",
        "RWKV",
        "293 MiB",
        "2.262",
    ):
        assert words in seen.text
    assert "Partial results" not in seen.text
    assert len([tag for tag, attrs in seen.elements if attrs.get("role") == "img" and attrs["aria-label"]]) == 8


def test_page_loads_nothing():
    text = html.render(made_up())  # with the real plotly.js
    seen = Page(text)
    loads = [
        attrs[key] for _, attrs in seen.elements for key in ("src", "href", "srcset", "action", "data") if key in attrs
    ]
    assert all(load.startswith(("#", "data:")) for load in loads), loads
    assert {tag for tag, _ in seen.elements}.isdisjoint({"iframe", "img", "object", "embed", "base", "form"})
    policy = next(attrs["content"] for tag, attrs in seen.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "http" not in policy
    css = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in css and "@import" not in css
    assert "plotly.js v" in text and "showSendToCloud: false" in text
    assert len(seen.scripts) == 4


@pytest.mark.parametrize("place", ["sample", "prompt", "title", "command", "machine", "equation"])
def test_hostile_text_stays_text(page, place):
    results = made_up()
    model = results["models"][0]
    if place in ("sample", "prompt"):
        model["samples"][0]["text" if place == "sample" else "prompt"] = HOSTILE
    elif place == "machine":
        results["machine"]["cpu"] = HOSTILE
    elif place == "command":
        results["command"] = HOSTILE
    else:
        model[place] = HOSTILE
    seen = page(results)
    assert len(seen.scripts) == 4 and "b" not in {tag for tag, _ in seen.elements}
    assert len(seen.data["plots"]) == 8 and not set("<>&") & set(seen.raw)
    assert "alert(1)" in seen.text
    assert not any("alert(1)" in text for attrs, text in seen.scripts if attrs.get("id") != "data")


def test_samples_keep_whitespace_and_show_control_characters():
    assert html.printable("a\n\t b\r\nc\x00\x1b\x7f\x85\ud800") == "a\n\t b\nc␀␛␡\ufffd?"
    text = html.render(made_up())
    assert '<span class="prompt">def read_csv(</span>self, &#39;mamba&#39;):\n\t\tif x &lt; 1 &amp; y &gt; 2:' in text


def test_verdict_says_what_the_figures_say():
    results = made_up()
    assert found(results, "text")["winners"] == ["jamba", "mamba2", "mamba"]  # within 2 %
    assert found(results, "text")["winner"] is None and found(results, "text")["kind"] == "tie"
    assert found(results, "text")["runner_up"] == "rwkv7"
    assert found(results, "beyond")["winners"] == ["mamba2", "mamba"]
    assert "Attention (+26 %)" in found(results, "beyond")["reason"]
    assert (found(results, "recall")["winner"], found(results, "recall")["runner_up"]) == ("attention", "jamba")
    assert found(results, "memory")["winner"] == "mamba" and "5,000 times" in found(results, "memory")["reason"]
    assert found(results, "prefill")["winners"] == ["mamba2", "griffin"]
    assert (
        found(results, "decode")["winner"] == "mamba2"
        and "Attention takes 7.4 times" in found(results, "decode")["reason"]
    )
    assert found(results, "train")["winners"] == ["mamba2", "jamba", "griffin"]
    assert found(results, "all_round")["winner"] == "mamba2"
    assert "tie for text quality" in headline(results)


def decoded(model: dict, *p50: float, p99: float = 1.3) -> None:
    """Latencies of a model at 1,024, 4,096 and 16,384 tokens."""
    pairs = zip((1024, 4096, 16_384), p50, strict=True)
    model["decode"] = [{"context": at, "p50_ms": ms, "p99_ms": ms * p99} for at, ms in pairs]


def test_noise_of_a_constant_state_is_no_growth(page):
    """A busy minute makes a token of Mamba 1.5 times as slow at 16K; its work is the same, and nothing else is said."""
    results = made_up("attention", "mamba", "rwkv7", "griffin")
    for model, ms in zip(
        results["models"], ((1.0, 1.5, 3.0), (0.07, 0.09, 0.105), (0.04, 0.03, 0.01), (0.5, 0.6, 0.9)), strict=True
    ):
        decoded(model, *ms)
    told = found(results, "decode")["reason"]
    assert "does not grow with the context for Mamba, RWKV-7 and Griffin, by construction" in told
    assert "From 1,024 to 16,384 tokens of context, Attention takes 3 times as long." in told
    for name in ("Mamba", "RWKV-7", "Griffin"):
        assert not re.search(rf"{name} (takes [\d.]+ times as long|stays? within)", told), told
    seen = page(results).text
    assert not re.search(r"(Mamba|RWKV.7|Griffin) takes [\d.]+ times as long", seen)


def test_python_and_programs_are_not_compared(page):
    """A model decoded in part by Python neither wins nor loses, however fast or slow; the sentence says what it is."""
    for ms in ((0.001, 0.001, 0.001), (1.6, 1.8, 2.87)):
        results = made_up("attention", "mamba", "mamba2")
        attention = results["models"][0]
        attention["engine"] = {"in_python": 2, "blocks": 4}
        decoded(attention, *ms)
        finding = found(results, "decode")
        assert finding["winner"] == "mamba2" and finding["runner_up"] == "mamba"
        assert f"Attention {ms[-1]:.3g} ms with 2 of 4 blocks in Python" in finding["reason"]
        assert "times as much" not in finding["reason"] and "by a native program" in finding["reason"]
        assert (
            "Not counted, since not all models can be compared: fastest decoding"
            in found(results, "all_round")["reason"]
        )
        row = next(r for r in html._rows(results) if r["model"]["name"] == "attention")
        assert next(cell for cell in row["cells"] if cell["value"] == ms[-1])["mark"] == "aside"
        seen = page(results)
        assert "not compared:" in seen.text and "Attention with 2 of 4 blocks in Python" in seen.text
        out = io.StringIO()
        summary(results, console=Console(file=out, width=120))
        assert "†" in out.getvalue() and "per token after 16,384 (1 not compared)" in out.getvalue()


@pytest.mark.parametrize("engines", [(None, None), (2, 0), (2, 1)])
def test_no_fastest_decoding_where_fewer_than_two_share_an_engine(engines):
    results = made_up("attention", "mamba")
    for model, python in zip(results["models"], engines, strict=True):
        model["engine"] = None if python is None else {"in_python": python, "blocks": 4}
    finding = found(results, "decode")
    assert (finding["kind"], finding["winner"], finding["winners"]) == ("none", None, [])
    assert "14.4 ms" in finding["reason"] and "Not compared" in finding["reason"]


def test_all_in_python_is_one_engine():
    results = made_up("attention", "mamba")
    for model in results["models"]:
        model["engine"] = {"in_python": 4, "blocks": 4}
    assert found(results, "decode")["winner"] == "mamba" and "Decoded by Python." in found(results, "decode")["reason"]


def test_who_had_not_finished_learning_neither_wins_nor_loses_recall(page):
    results = made_up("attention", "mamba", "mamba2", "jamba")
    mamba2 = results["models"][2]
    for accuracy in (0.32, 1.0):
        mamba2["recall"].update(finished=False, train_tokens=320_000, pairs=[[n, accuracy] for n in (4, 8, 16, 32, 64)])
        finding = found(results, "recall")
        assert finding["winner"] == "attention" and "mamba2" not in (finding["runner_up"], *finding["winners"])
        assert f"Mamba-2 {100 * accuracy:.0f} % after 320,000 tokens" in finding["reason"]
        assert "Had not finished learning" in finding["reason"]
    assert "Not finished with learning when the training ended: Mamba" in page(results).text
    for model in results["models"]:
        model["recall"]["finished"] = False
    finding = found(results, "recall")
    assert finding["kind"] == "none" and not finding["winners"] and "Had not finished learning" in finding["reason"]


@pytest.mark.parametrize("sign", ["load", "tail"])
def test_a_busy_machine_is_said(page, sign):
    results = made_up("mamba", "mamba2")
    assert "busy" not in page(results).text
    if sign == "load":
        results["models"][1]["load"] = 8.3
    else:
        decoded(results["models"][1], 0.03, 0.03, 0.0336, p99=300)
    words = {
        "load": "a load of 8.3 on 2 cores",
        "tail": "one token in a hundred took Mamba-2 300 times the median or more",
    }
    assert words[sign] in caveats(results)[0] and "The machine was busy" in page(results).text
    out = io.StringIO()
    summary(results, console=Console(file=out, width=200))
    assert words[sign] in out.getvalue()
    for need in ("prefill", "decode", "train"):
        finding = found(results, need)
        assert finding["kind"] == "none" and not finding["winners"] and words[sign] in finding["reason"]
    assert "Not counted, since the machine was busy: the speeds." in found(results, "all_round")["reason"]


def test_a_busy_machine_hides_no_figure():
    results = made_up("mamba", "mamba2", "attention")
    results["models"][0]["load"] = 8.3
    attention = next(model for model in results["models"] if model["name"] == "attention")
    attention["engine"] = {"in_python": 2, "blocks": 4}
    reason = found(results, "decode")["reason"]
    assert "Measured" in reason and "Not compared" in reason and "with 2 of 4 blocks in Python" in reason


def test_a_growing_state_that_was_timed_faster_is_noise():
    results = made_up("mamba", "attention")
    for model in results["models"]:
        decoded(model, *((8.05, 4.0, 2.03) if model["name"] == "attention" else (1.4, 1.4, 1.4)))
    assert "Attention was timed faster, which is noise" in found(results, "decode")["reason"]


def test_two_figures_have_two_names(page):
    """Bits per byte of all held-out text, and of its ends alone, are other figures; so are their names."""
    columns = {measure.key: (measure.column, measure.unit) for measure in MEASURES}
    assert columns["text"][0] != columns["beyond"][0] and columns["text"][1] != columns["beyond"][1]
    labels = [column["label"] for column in html._columns(made_up())]
    assert len(set(labels)) == len(labels), labels
    plots = {plot["key"]: plot for plot in figures(made_up())}
    assert plots["length"]["y"]["title"] == "bits per byte of the ends" != plots["position"]["y"]["title"]


def test_the_live_table_names_the_length_whose_state_it_shows():
    from everlong.report.terminal import COLUMNS, STATE_AT

    column = next(column for column in COLUMNS if column.key == "state")
    assert column.plain == f"of state at {STATE_AT:,} tokens" and column.head == f"state\n{STATE_AT // 1024}K"


def test_the_title_promises_no_equal_terms():
    assert html._heading(made_up()) == "Six architectures, one text, one recipe"


def test_a_clear_lead_wins_and_a_small_one_ties():
    results = made_up("mamba", "mamba2")
    first, second = results["models"]
    for value, kind in ((2.0, "win"), (2.288 * 0.979, "win"), (2.288 * 0.985, "tie"), (2.288 * 1.015, "tie")):
        first["text"]["bits_per_byte"], second["text"]["bits_per_byte"] = value, 2.288
        assert found(results, "text")["kind"] == kind, value
    first["training"]["tokens_per_second"], second["training"]["tokens_per_second"] = 1.0, 1.09
    assert found(results, "train")["kind"] == "tie"
    second["training"]["tokens_per_second"] = 1.12
    assert found(results, "train")["winner"] == "mamba2"


def test_lengths_that_not_all_have_are_not_compared():
    results = made_up("attention", "mamba")
    results["models"][0]["decode"] = results["models"][0]["decode"][:2]  # attention was measured to 1,024 only
    assert "after 1,024" in found(results, "decode")["figure"]
    results["models"][0]["decode"] = [{"context": 77, "p50_ms": 1.0}]
    assert found(results, "decode")["kind"] == "missing"


def test_nobody_wins_recall_at_chance():
    results = made_up()
    for model in results["models"]:
        model["recall"]["pairs"] = [[4, 0.03], [8, 0.02]]
    finding = found(results, "recall")
    assert finding["kind"] == "none" and finding["winner"] is None and "1.6 %" in finding["reason"]


def test_models_cut_short_are_not_ranked_for_text(page):
    results = made_up()
    jamba = results["models"][-1]
    jamba["status"], jamba["training"]["tokens"], results["complete"] = "partial", 100_000, False
    finding = found(results, "text")
    assert "jamba" not in finding["winners"] and "cut short: Jamba" in finding["reason"]
    assert any("partial" in line and "Jamba" in line for line in caveats(results))
    seen = page(results)
    assert "Partial results." in seen.text and "5 of 6 models are complete; not yet: Jamba (partial)" in seen.text


@pytest.mark.parametrize("block", ["training", "text", "recall", "state_bytes", "prefill", "decode", "samples"])
def test_a_missing_block_is_said_not_guessed(page, block):
    results = stripped(block)
    key = {"text": "text", "training": "train", "state_bytes": "memory", "samples": "text"}.get(block, block)
    assert found(results, key)["kind"] == ("tie" if block == "samples" else "missing")
    seen = page(results)
    assert set(SECTIONS) <= seen.ids
    if block != "samples":
        need = next(measure.need for measure in MEASURES if measure.key == key)
        assert f"{need.lower()}" in seen.text.lower() and "not measured" in seen.text


def test_nulls_and_not_a_number_are_left_out(page):
    results = made_up("mamba", "mamba2", "rwkv7")
    broken, empty, _ = results["models"]
    broken["text"]["bits_per_byte"] = math.nan
    broken["text"]["by_length"][1][1] = math.inf
    broken["prefill"][0][1] = None
    for block in ("training", "text", "recall", "state_bytes", "prefill", "decode", "samples", "memory", "layers"):
        empty[block] = None
    assert found(results, "text")["kind"] == "only" and found(results, "text")["winner"] == "rwkv7"
    assert "NaN" not in json.dumps(page(results).data)


@pytest.mark.parametrize(
    "results", [{}, {"models": []}, {"models": [{"name": "mamba"}]}, {"version": 1, "models": None}]
)
def test_almost_nothing_still_makes_a_page(page, results):
    seen = page(results)
    assert set(SECTIONS) <= seen.ids
    assert {finding["kind"] for finding in verdict(results)} == {"missing"}
    assert caveats(results) and headline(results)
    summary(results, console=Console(file=io.StringIO()))


def test_one_model_wins_nothing(page):
    results = made_up("rwkv7")
    kinds = {finding["key"]: finding["kind"] for finding in verdict(results)}
    assert set(kinds.values()) == {"only", "missing"} and kinds["all_round"] == "missing"
    assert headline(results) == "Only RWKV-7 was measured, so there is nothing to compare yet."
    assert not [attrs for tag, attrs in page(results).elements if tag == "td" and "best" in attrs["class"]]


def test_verdict_changes_nothing_and_is_plain_data():
    results = made_up()
    before = copy.deepcopy(results)
    json.dumps(verdict(results)), figures(results), html.render(results)
    assert results == before


def test_every_model_keeps_one_look():
    everyone, two = looks(made_up()), looks(made_up("mamba2", "jamba"))
    assert two["mamba2"] == everyone["mamba2"] and two["jamba"] == everyone["jamba"]
    for key in ("light", "dark", "marker"):
        assert len({look[key] for look in everyone.values()}) == 6
    strangers = looks({"models": [{"name": f"model{i}"} for i in range(30)] + [{"name": "mamba"}]})
    assert len(strangers) == 31


def test_decode_band_and_state_markers_are_drawn():
    plots = {plot["key"]: plot for plot in figures(made_up())}
    line = plots["decode"]["series"][0]
    assert all(high > low for high, low in zip(line["band"], line["y"], strict=True)) and "P99" in line["hover"][0]
    modes = [series["mode"] for series in plots["state"]["series"]]
    assert modes == ["lines"] * 6 + ["markers"] * 6 and plots["state"]["x"]["log"] and plots["state"]["y"]["log"]
    assert plots["recall"]["lines"][0]["y"] == 1 / 64
    assert plots["length"]["x"]["ticktext"] == ["256 (1×)", "512 (2×)", "1,024 (4×)", "2,048 (8×)"]


def test_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    html.write_report(made_up("mamba"), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        html.write_report(made_up("mamba2"), path)
    assert path.read_bytes() == old and [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_importing_the_report_does_not_import_plotly():
    code = "import sys, everlong.report.html, everlong.report.terminal; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sizes_read_well():
    assert [size(value) for value in (12, 98_304, 1536, 307_200_000)] == ["12 B", "96 KiB", "1.5 KiB", "293 MiB"]


def test_board_prints_one_line_per_stage_where_nobody_watches():
    out = io.StringIO()
    with Board({"mamba": "Mamba", "jamba": "Jamba"}, Console(file=out, width=200)) as board:
        board.update("mamba", status="training", progress=0.0, params=812_000)
        for step in range(5):
            board.update("mamba", progress=step / 5, train=1000.0 + step, loss=3.0 - step / 10)
        board.update("mamba", status="measuring", held_out=2.5)
        board.update("mamba", status="done", recall=0.5, decode=float("nan"))
    lines = out.getvalue().splitlines()
    assert lines == [
        "Mamba: training: 0.81M parameters, 1,004 tokens/s trained, 2.600 bits per byte now",
        "Mamba: measuring: 2.500 bits per byte held out",
        "Mamba: done: 50 % recall",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_board_draws_a_table_on_a_terminal(width):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with Board(["mamba", "jamba"], console) as board:
        board.update("mamba", status="training", progress=0.43, params=812_000, train=12_345.6)
        board.update("jamba", status="done", state=198_656, prefill=57_840)
    shown = out.getvalue()
    for words in ("mamba", "12,346", "194 KiB", "57,840", "training", "43%" if width == 80 else "━"):
        assert words in shown


def test_board_teaches_its_names():
    board = Board(["mamba"], Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="no model 'mambo' on the board; did you mean 'mamba'"):
        board.update("mambo")
    with pytest.raises(ValueError, match="no column 'recal' on the board; did you mean 'recall'"):
        board.update("mamba", recal=0.1)


def test_summary_prints_table_verdict_and_path(tmp_path):
    out = io.StringIO()
    results = made_up()
    results["models"][0]["status"] = "partial"
    summary(results, tmp_path / "report.html", Console(file=out, width=120))
    shown = out.getvalue()
    for words in (
        "2.262*",
        "60 KiB*",
        "Best all-round: Mamba-2",
        "Partial results (Attention)",
        str(tmp_path / "report.html"),
    ):
        assert words in shown
