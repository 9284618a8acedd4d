"""Triton's interpreter in the place of a card; import it behind `importorskip("triton")`."""

from pytest import MonkeyPatch
from triton_layers import DEVICE

from lowtide.kernels.triton import tiles
from lowtide.runtime import network, on_gpu


def interpret(monkeypatch: MonkeyPatch, columns: int) -> None:
    """Where there is no card, the interpreter takes its place, on tiles that it likes."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(on_gpu, "missing", lambda device: "")
        monkeypatch.setattr(network, "is_card", lambda device: True)
        wide = (tiles.Tile(64, columns, 128, 1, 1), tiles.Tile(64, columns, 64, 1, 1))
        monkeypatch.setitem(tiles.CARDS, tiles.INTERPRETER, tiles.Card(1, 2**20, wide))
        tiles.likely.cache_clear()
