"""PGD-AT's step with other libraries, each as its documentation shows."""

import torch
import torch.nn.functional as F
from steps import EPS, LENGTH, STEPS, Step
from torch import Tensor, nn

from clat.data.dataset import to_unit


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    model.train()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def by_torchattacks(model: nn.Module, pixels: Tensor, y: Tensor) -> Step:
    import torchattacks

    attack = torchattacks.PGD(model, eps=EPS, alpha=LENGTH, steps=STEPS)
    optimizer, x = sgd(model), to_unit(pixels)
    return lambda: train_on(model, optimizer, attack(x, y), y)


def by_foolbox(model: nn.Module, pixels: Tensor, y: Tensor) -> Step:
    import foolbox

    optimizer, x = sgd(model), to_unit(pixels)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=LENGTH, steps=STEPS)

    def step() -> None:
        wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
        _, attacked, _ = attack(wrapped, x, y, epsilons=EPS)
        train_on(model, optimizer, attacked, y)

    return step


def by_art(model: nn.Module, pixels: Tensor, y: Tensor) -> Step:
    from art.defences.trainer import AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        optimizer=sgd(model),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="gpu" if pixels.is_cuda else "cpu",
    )
    trainer = AdversarialTrainerMadryPGD(
        classifier, nb_epochs=1, batch_size=len(y), eps=EPS, eps_step=LENGTH, max_iter=STEPS, num_random_init=1
    )
    x, labels = to_unit(pixels).cpu().numpy(), F.one_hot(y, 10).cpu().numpy()
    return lambda: trainer.fit(x, labels)


PEERS = {"torchattacks": by_torchattacks, "foolbox": by_foolbox, "adversarial-robustness-toolbox": by_art}
