"""A network as an ONNX file, which runs without PyTorch."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from clat.errors import InputError
from clat.files import write_atomically
from clat.network import Images, class_scores, held, logits
from clat.text import plain

LARGEST = 2**31 - 1  # bytes, as the format allows
NEEDED = ("onnx", "onnxscript")
TOLERATED = 1e-3  # difference of a class score, as a share of the largest


class _Scores(nn.Module):
    """Class scores alone, whatever else the network returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Images) -> Tensor:
        return logits(self.model(pixels))


def export_onnx(model: nn.Module, to: Path | str, shape: Sequence[int]) -> float:
    """Writes a network as an ONNX file, atomically, and returns the largest difference of a class score.

    Its input is ``pixels`` (batch, channel, height, width) in [0, 1], like the network's own, since the normalisation
    is inside; the batch may have any length. Its output is ``scores`` (batch, classes). Before the file is written,
    its scores of a random image, by onnx's reference implementation, are compared with the network's.

    Args:
        model: takes pixels in [0, 1]; it may be on any device
        shape: channels, height and width of the images
    Raises:
        InputError: a package of ``NEEDED`` is missing, a network that cannot be exported or would compute something
            else, or a place that cannot be written
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"ONNX files need {' and '.join(missing)}: pip install {' '.join(NEEDED)}.")
    state = model.state_dict().values()
    if sum(tensor.nbytes for tensor in state) > LARGEST:
        raise InputError("An ONNX file holds at most 2 GB, and the network is larger; write its weights instead.")
    from onnx.reference import ReferenceEvaluator

    place = next((tensor.device for tensor in state), None)
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with held(model), torch.no_grad():
            program = torch.onnx.export(
                _Scores(model).eval(),
                (images[:2].to(place),),
                input_names=["pixels"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        (found,) = ReferenceEvaluator(program.model_proto).run(None, {"pixels": images[2:].numpy()})
    except Exception as error:  # the exporter and the evaluator may raise anything
        said = plain(" ".join(str(error).split())[:200]).rstrip(".")
        raise InputError(
            f"The network cannot be written as an ONNX file ({type(error).__name__}: {said}); write its weights as "
            "safetensors instead."
        ) from error
    scores = class_scores(model, images[2:].to(place)).cpu()
    difference = (torch.from_numpy(found) - scores).abs().max().item()
    if not difference <= TOLERATED * scores.abs().max().item():
        raise InputError(
            f"The ONNX file would give class scores that differ by {difference:.2g} from the network's, so it was not "
            "written; write its weights as safetensors instead."
        )
    program.model.metadata_props["pixels"] = "in [0, 1]; the network normalises them itself"
    write_atomically(Path(to), lambda temporary: program.save(temporary, external_data=False))
    return difference
