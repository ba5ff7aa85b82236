"""Handing a network on: adapters, weights that load without clat, ONNX files and the Hugging Face hub."""

from clat.checkpoint import export_weights
from clat.sharing.adapters import Adapter, apply_adapter, load_adapter, save_adapter
from clat.sharing.hub import from_pretrained, push_to_hub, save_pretrained
from clat.sharing.onnx_file import export_onnx

__all__ = [
    "Adapter",
    "apply_adapter",
    "export_onnx",
    "export_weights",
    "from_pretrained",
    "load_adapter",
    "push_to_hub",
    "save_adapter",
    "save_pretrained",
]
