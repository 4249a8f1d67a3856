"""The notebook runs from its first cell to its last, and shows a table and a plot for each
sweep."""

import nbformat
from nbclient import NotebookClient
from train.tiny_run import ROOT


def test_ablations_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("MOR_JAX_NOTEBOOK_RUNS", str(tmp_path))
    # The cells import this checkout, as do the commands of the other tests.
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    notebook = nbformat.read(ROOT / "notebooks" / "ablations.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), (
        "clear the outputs before committing"
    )
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    shown = [o.get("data", {}) for cell in notebook.cells for o in cell.get("outputs", ())]
    tables = ["".join(data["text/markdown"]) for data in shown if "text/markdown" in data]
    assert len(tables) == 2 and sum("image/png" in data for data in shown) == 2
    assert "middle_cycle" in tables[0] and " ± " in tables[0] and "paper" in tables[0]
    assert "token_choice" in tables[1] and "expert_choice" in tables[1]
    assert (tmp_path / "sharing" / "middle_cycle-N_r3" / "seed1" / "summary.json").exists()
