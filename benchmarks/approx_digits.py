"""A small network trained on real images, and what each of its convolutions loses as GC and BGC.

    python -m benchmarks.approx_digits [--out results/approx-wrn_16_4-digits-cpu.json] [--plot FILE]

wrn_16_4 on scikit-learn's digits: some eight epochs of SGD bring its test error to about 1 %. The weights are kept in a
temporary folder; what is written is the result of ``bgcbench approx --model wrn_16_4 --weights FILE --data digits``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bgcbench.cli import main as command
from bgcbench.data.digits import Digits, open_digits
from bgcbench.models import build_model

MODEL, EPOCHS, BATCH = "wrn_16_4", 8, 64


def train(digits: Digits, epochs: int) -> tuple[nn.Module, float]:
    """The network and its test error."""
    torch.manual_seed(0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (digits.mean, digits.std))
    images = (digits.pixels.float() / 255 - mean) / std
    train_on, test_on = torch.tensor(digits.train), torch.tensor(digits.test)
    model = build_model(MODEL)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(train_on) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    for epoch in range(epochs):
        for chosen in train_on[torch.randperm(len(train_on))].split(BATCH):
            if len(chosen) < BATCH:
                continue
            down, right = torch.randint(0, 5, (2,)).tolist()
            x = F.pad(images[chosen], (2, 2, 2, 2))[:, :, down : down + 16, right : right + 16]
            loss = F.cross_entropy(model(x), digits.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            error = float((model(images[test_on]).argmax(1) != digits.labels[test_on]).float().mean())
        model.train()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test error {error:.2%}")
    return model, error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/approx-wrn_16_4-digits-cpu.json"))
    parser.add_argument("--plot", type=Path, default=Path("results/approx-wrn_16_4-digits-cpu.png"))
    options = parser.parse_args()
    model, error = train(open_digits(), EPOCHS)
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            weights = f"{MODEL}-digits-error{error * 100:.1f}.pt"
            torch.save(model.state_dict(), weights)
            code = command(["approx", "--model", MODEL, "--weights", weights, "--data", "digits", "--device", "cpu",
                            "--out", "r.json", "--plot", "r.png"])  # fmt: skip
        finally:
            os.chdir(start)
        if code == 0:
            shutil.copy(Path(folder, "r.json"), options.out)
            shutil.copy(Path(folder, "r.png"), options.plot)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
