"""The document of scales has the tables that the program prints, and no others."""

from __future__ import annotations

from pathlib import Path

import scaling

from mmrlhf.modules.pace import Assumed, pace

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_document_has_the_printed_tables():
    document = DOCUMENT.read_text()
    printed = list(scaling.tables())
    assert [table.splitlines()[0] for table in printed if table not in document] == []
    lines = {line for table in printed for line in table.splitlines()}
    own = document.partition("## Where figures come from")[2].partition("\n## ")[0]
    others = [line for line in document.splitlines() if line.startswith("|") and line not in lines]
    assert [line for line in others if line not in own] == []


def test_what_the_document_says_of_hsdp_and_of_hops_is_in_the_rows():
    document = " ".join(DOCUMENT.read_text().split())
    at = [(model, gpus) for model in ("0.5B", "7B") for gpus in (16, 64, 256, 512)]
    slower = [each for each in at if seconds(*each, "HSDP") >= seconds(*each, "FSDP")]
    assert slower == [("7B", 512)]
    assert f"HSDP is faster than FSDP in {len(at) - len(slower)} of {len(at)} comparisons" in document
    for model, gpus in (("0.5B", 512), ("7B", 16), ("7B", 512)):
        assert f"{seconds(model, gpus, 'HSDP'):.2f} s against {seconds(model, gpus, 'FSDP'):.2f} s" in document
    found = scaling.row("0.5B", 64, "FSDP", False)
    assumed = Assumed(hop_inside=0.0, hop_between=0.0)
    told = (scaling.body_of("0.5B"), found.found.layout, found.found.batches, scaling.QUERY, scaling.H100)
    hops = found.pace.network - pace(*told, assumed).network
    assert hops < found.pace.arithmetic < found.pace.network
    assert (
        f"take {found.pace.network:.2f} s, of which {hops:.2f} s are hops, against {found.pace.arithmetic:.2f} s"
    ) in document


def seconds(model, gpus, way):
    return scaling.row(model, gpus, way, False).pace.seconds


def test_the_document_says_what_the_first_host_holds_at_the_end():
    document = " ".join(DOCUMENT.read_text().split())
    sizes = {
        model: 4 * sum(weight.numel() for weight in scaling.body_of(model).parameters()) / 1e9
        for model in ("7B", "72B")
    }
    assert f"in float32 {sizes['7B']:.0f} GB for 7B, {sizes['72B']:.0f} GB for 72B" in document
    assert f"at the end: {sizes['72B']:.0f} GB" in document.partition("What breaks first")[2]
