#!/usr/bin/env python3
"""Parameters and operations of gkvit encoders beside those of SegFormer's (MiT) and PVTv2's pyramids.

    .venv/bin/python scripts/encoder_costs.py --out results/encoder_costs.csv

The paper of the walk kernel claims 15 % fewer parameters and 10 to 25 % less computation in segmentation. Nothing is
run but on the 'meta' device, so the figures are exact: parameters without a classifier, and multiply-accumulates of
one image with the products of attention. timm has no MiT: it is timm's PVTv2 with MLPs of ratio 4 in all stages, which
has the sizes published for SegFormer's encoders B1, B2, B3 and B5 (arXiv 2105.15203: 13.1, 24.2, 44.0 and 81.4 M).
Savings are in percent of the peer.
"""
import argparse
from pathlib import Path

import timm

import vitlinear  # noqa: F401
from vitlinear.tools.info import count_macs
from vitlinear.zoo.records import csv_text, write_text

PEERS = {'gkvit_nano': 'b0', 'gkvit_tiny': 'b1', 'gkvit_small': 'b2', 'gkvit_base': 'b3', 'gkvit_large': 'b5'}
FIELDS = ['model', 'size', 'params_m', 'gmacs', 'peer', 'peer_params_m', 'peer_gmacs', 'params_saved', 'macs_saved']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=int, nargs='+', default=[512, 1024], metavar='N', help='pixels of a side')
    parser.add_argument('--out', type=Path, metavar='FILE', help='CSV file to write')
    args = parser.parse_args()
    rows = []
    for name, letter in PEERS.items():
        encoders = {
            name: timm.create_model(name, num_classes=0, device='meta'),
            f'mit_{letter}': timm.create_model(
                f'pvt_v2_{letter}', num_classes=0, mlp_ratios=(4, 4, 4, 4), device='meta'),
            f'pvt_v2_{letter}': timm.create_model(f'pvt_v2_{letter}', num_classes=0, device='meta'),
        }
        params = {k: sum(p.numel() for p in encoder.parameters()) for k, encoder in encoders.items()}
        for size in args.sizes:
            macs = {k: count_macs(encoder, (3, size, size)) for k, encoder in encoders.items()}
            for peer in list(encoders)[1:]:
                rows.append(dict(
                    model=name, size=size, params_m=f'{params[name] / 1e6:.2f}', gmacs=f'{macs[name] / 1e9:.2f}',
                    peer=peer, peer_params_m=f'{params[peer] / 1e6:.2f}', peer_gmacs=f'{macs[peer] / 1e9:.2f}',
                    params_saved=f'{100 - 100 * params[name] / params[peer]:.1f}',
                    macs_saved=f'{100 - 100 * macs[name] / macs[peer]:.1f}'))
    for row in [dict(zip(FIELDS, FIELDS)), *rows]:
        print('  '.join(f'{row[field]:>13}' for field in FIELDS))
    if args.out:
        write_text(args.out, csv_text(FIELDS, rows))


if __name__ == '__main__':
    main()
