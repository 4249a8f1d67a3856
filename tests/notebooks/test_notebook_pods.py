"""The notebook of pods runs from its first cell to its last: a plan, its collectives, and meshes
that equal one device."""

import re

import nbformat
from nbclient import NotebookClient
from train.tiny_run import ROOT


def test_pods_end_to_end(monkeypatch):
    # The cells import this checkout, as do the commands of the other tests.
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    notebook = nbformat.read(ROOT / "notebooks" / "pods.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "clear the outputs before committing"
    )
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    needs, traffic, curves = ("".join(o["data"]["text/markdown"]) for o in outputs if "data" in o)
    printed = "".join(o["text"] for o in outputs if "text" in o)
    assert "| parameters |" in needs and "GiB" in needs and "--config.mesh.fsdp=" in printed
    assert "| core | all-gather | fsdp |" in traffic
    assert len(re.findall(r"^\| \d \|( \d\.\d{6} \|){3}$", curves, re.M)) == 5
    assert "largest difference of a loss" in printed and "reduce-scatter over fsdp" in printed
