"""A short model card: Markdown with the YAML that the Hugging Face hub reads before it."""

from collections.abc import Mapping
from typing import Any

import yaml

from clat.evaluation.accuracy import Accuracy
from clat.text import plain

FRONT = {
    "library_name": "clat",
    "pipeline_tag": "image-classification",
    "tags": ["adversarial-robustness", "clat"],
}


def model_card(facts: Mapping[str, Any], recipe: Mapping[str, Any] | None, name: str) -> str:
    """What a checkpoint is, how it was trained, what it reached, and how to load it.

    Args:
        facts: those stored with the checkpoint
        recipe: that of its run, if there is one
        name: of the network on the hub
    """
    model, data, layers = facts.get("model"), facts.get("data"), facts.get("selected")
    own = "" if model and ":" not in model["name"] else ", model=yours"  # as for load_checkpoint
    lines = [f"A network {_code(model['name'])}." if model else "A network of its own code."]
    if data:
        size = "x".join(map(str, data["shape"]))
        lines.append(f"Trained on {_code(data['source'])}: {len(data['classes'])} classes, images of {size}.")
    if layers:
        lines.append(f"The last training changed only {', '.join(map(_code, layers))}.")
    parts = [
        f"---\n{yaml.safe_dump(FRONT, sort_keys=False)}---",
        f"# {plain(name)}",
        "\n".join(lines),
        _accuracies(facts.get("validation"), recipe),
        "It takes pixels in [0, 1]:",
        f"```python\nfrom clat.sharing import from_pretrained\n\nmodel = from_pretrained({plain(name)!r}{own})\n```",
        f"The recipe:\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```" if recipe else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _accuracies(found: Mapping[str, Any] | None, recipe: Mapping[str, Any] | None) -> str:
    """What the validation of its run found; nothing for a checkpoint without one."""
    clean, robust, images = ((found or {}).get(key, -1) for key in ("clean", "robust", "validation_images"))
    if not (0 <= clean <= 1 and 0 <= robust <= 1 and 1 <= images < 2**53):
        return ""
    rows = [Accuracy(round(share * images), int(images)) for share in (clean, robust)]
    attack = "PGD (`threat` and the keys of validation in the recipe below)" if recipe else "attack"
    return (
        f"| on {int(images):,} held-out training images | accuracy |\n|---|---|\n| clean | {rows[0]} |\n"
        f"| under {attack} | {rows[1]} |\n\n"
        "The best checkpoint of a run is chosen by these images. Measure it on others with `clat evaluate`, and check "
        "it with `clat trust`."
    )


def _code(text: object) -> str:
    """Text from a file as code in Markdown, which it cannot end."""
    return f"`{plain(text).replace('`', chr(39))}`"
