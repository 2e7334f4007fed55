r"""What limits a refiner: its own answers at the sites against those of dense networks at the same sites (validation).

python examples/hrf/diagnose.py --refiner runs/hrf/refiner4/best \
        --dense 1=runs/hrf/dense1/best.safetensors 0.5=runs/hrf/dense2/best.safetensors
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from sparserefine import BaseConfig, SparseRefiner
from sparserefine.bases.load import load_base
from sparserefine.data.readers.hrf import hrf
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import uncertainty
from sparserefine.scores.confusion import confusion, dice
from sparserefine.stages.ensembler import MeanEnsembler, MinimumEntropyEnsembler


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refiner", required=True)
    parser.add_argument("--dense", nargs="*", default=[], metavar="RATIO=FILE")
    parser.add_argument("--data", default="../shared/data/hrf")
    parser.add_argument("--val", default="14-15")
    args = parser.parse_args()

    refiner = SparseRefiner.from_pretrained(args.refiner)
    peers = {}
    for item in args.dense:
        ratio, _, file = item.partition("=")
        peers[f"dense {ratio}"] = load_base(BaseConfig(f"unet:{file}", ratio=float(ratio)), 2)
    data = hrf(args.data, args.val)
    everywhere: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, 2, dtype=torch.int64))
    at_sites: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, 2, dtype=torch.int64))
    for index in range(len(data)):
        image, truth = data.read(index)
        result = refiner(image[None])
        mask = result.sites.mask()[0]
        labels = {"coarse": result.coarse_labels[0], "refined": result.labels()[0]}
        labels["sparse"] = result.with_sites(result.sparse_logits.argmax(1))[0]
        for name, ensembler in (("mean", MeanEnsembler()), ("minimum entropy", MinimumEntropyEnsembler())):
            labels[name] = result.with_sites(ensembler(result.coarse_logits, result.sparse_logits).argmax(1))[0]
        for name, peer in peers.items():
            labels[name] = uncertainty(Coarse(peer(image[None]), (truth.shape[0], truth.shape[1])))[0][0]
            labels[f"{name} at our sites"] = torch.where(mask, labels[name], labels["coarse"])
        for name, found in labels.items():
            everywhere[name] += confusion(found, truth, 2)
            at_sites[name] += confusion(found[mask], truth[mask], 2)
    print("| labels | Dice | at the sites only |\n|---|---|---|")
    for name, matrix in everywhere.items():
        print(f"| {name} | {dice(matrix)[1]:.4f} | {dice(at_sites[name])[1]:.4f} |")


if __name__ == "__main__":
    main()
