"""Networks on the Hugging Face hub, after the conventions of ``huggingface_hub``: a folder that names what it holds.

model.safetensors  a checkpoint of clat, as in a run folder
config.json        the network's name, classes and normalisation, for people and the hub; clat does not read it
README.md          the model card
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from clat.checkpoint import checkpoint_path, load_checkpoint, load_header, load_tensors, save_tensors
from clat.errors import InputError
from clat.files import write_text
from clat.sharing.card import model_card
from clat.text import plain
from clat.training.runs import Run

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    source: Path | str, folder: Path | str, *, card: str | None = None, name: str | None = None, overwrite: bool = False
) -> None:
    """Writes a network into a folder as ``push_to_hub`` uploads it and ``from_pretrained`` reads it.

    Args:
        source: a run folder (its best checkpoint) or a checkpoint
        folder: where to write; other files in it stay
        card: the model card in Markdown; default a short one, made from the run
        name: of the network in that card; default the folder
        overwrite: replace a network that is there already
    Raises:
        InputError: no checkpoint, a damaged one, or a folder that is taken or cannot be written
    """
    path, folder = checkpoint_path(source), Path(folder)
    for each in (WEIGHTS, CONFIG, CARD):
        if (folder / each).exists() and not overwrite:
            raise InputError(f"{plain(folder / each)} is there already; choose another folder or give overwrite=True.")
    facts, tensors = load_header(path).facts, load_tensors(path)[0]
    run = Run(path.parent)
    recipe = run.recipe if run.exists and "epoch" in facts else None
    config: dict[str, Any] = {"library_name": "clat", "model": facts.get("model")}
    config |= {key: tensors[key].flatten().tolist() for key in ("mean", "std") if key in tensors}
    if data := facts.get("data"):
        config |= {"shape": data["shape"], "id2label": dict(enumerate(data["classes"]))}
    save_tensors(folder / WEIGHTS, tensors, **facts)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / CARD, card or model_card(facts, recipe, name or str(folder)))


def push_to_hub(
    source: Path | str,
    repo_id: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Push model using clat",
    endpoint: str | None = None,
) -> str:
    """Uploads a network to the hub and returns the address of the commit.

    Args:
        source, card: as for ``save_pretrained``
        repo_id: owner and name on the hub; made there if it does not exist
        private: for a new one; default the owner's setting
        token: default that of ``hf auth login``
        endpoint: another hub than huggingface.co
    Raises:
        InputError: as for ``save_pretrained``, or a hub that cannot be reached or refuses
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save_pretrained(source, folder, card=card, name=repo_id)
        try:
            api = HfApi(endpoint=endpoint, token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message))
        except Exception as error:  # the client raises errors of whichever library it speaks HTTP with
            raise InputError(
                f"{plain(repo_id)} could not be written on the hub ({_said(error)}); {plain(source)} is as it was; "
                "push it again later, or write a folder with save_pretrained."
            ) from error


def from_pretrained(name: Path | str, model: nn.Module | None = None, **download: Any) -> nn.Module:
    """The network of a local folder or of the hub, in eval mode; nothing that it brings is executed.

    Args:
        name: a folder that ``save_pretrained`` wrote, or owner and name on the hub
        model: a network to read the weights into, as for ``load_checkpoint``
        download: as for ``huggingface_hub.hf_hub_download``: revision, token, cache_dir, local_files_only, endpoint
    Raises:
        InputError: neither, a hub that cannot be reached, or a file that ``load_checkpoint`` refuses
    """
    if os.path.isdir(name):
        return load_checkpoint(Path(name) / WEIGHTS, model)[0]
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(str(name), WEIGHTS, **download)
    except Exception as error:
        raise InputError(
            f"{plain(name)} is no folder here and could not be read from the hub ({_said(error)}); check the name and "
            "the connection, or name a folder."
        ) from error
    return load_checkpoint(path, model)[0]


def _said(error: Exception) -> str:
    return plain(" ".join(str(error).split())[:200]).rstrip(".") or type(error).__name__
