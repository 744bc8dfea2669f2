"""Numbers made with the authors' code, and the names of their parameters."""
import json
import math
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

VVT = Path(__file__).parent / 'golden' / 'vvt'
QNA = Path(__file__).parent / 'golden' / 'qna'
CASTLING = Path(__file__).parent / 'golden' / 'castling'


@cache
def vvt_tensors() -> dict[str, torch.Tensor]:
    """Parameters, inputs, outputs, cotangents and gradients by `<case>/...`."""
    return {**load_file(VVT / 'golden.safetensors'), **load_file(VVT / 'golden_grads.safetensors')}


@cache
def vvt_facts() -> dict:
    return json.loads((VVT / 'golden.json').read_text())


@cache
def vvt_state_shapes() -> dict:
    return json.loads((VVT / 'state_shapes.json').read_text())['variants']


def part(case: str, what: str) -> dict[str, torch.Tensor]:
    """The tensors of `<case>/<what>/<key>` by key, in the file's order."""
    prefix = f'{case}/{what}/'
    return {k[len(prefix):]: v for k, v in vvt_tensors().items() if k.startswith(prefix)}


def authors_key(key: str) -> str:
    """Our parameter name, other than of a fused projection, as the authors call it."""
    key = re.sub(r'^patch_embed\.', 'patch_embed1.', key)
    key = re.sub(r'^stages\.(\d+)\.downsample\.', lambda m: f'patch_embed{int(m[1]) + 1}.', key)
    key = re.sub(r'^stages\.(\d+)\.blocks\.', lambda m: f'block{int(m[1]) + 1}.', key)
    key = re.sub(r'^stages\.(\d+)\.norm\.', lambda m: f'norm{int(m[1]) + 1}.', key)
    key = key.replace('.attn.proj.', '.attn.out_proj.').replace('.mlp.dwconv.', '.mlp.dwconv.dwconv.')
    return key.replace('.attn.fpc.fc1.', '.attn.se_fc.0.').replace('.attn.fpc.fc2.', '.attn.se_fc.2.')


def to_authors(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the authors' names."""
    out = {}
    for key, value in state_dict.items():
        if '.attn.qkv.' in key:
            for name, chunk in zip('qkv', value.chunk(3)):
                out[authors_key(key.replace('.qkv.', f'.{name}_proj.'))] = chunk.clone()
        else:
            out[authors_key(key)] = value
    return out


def grid(case: str) -> tuple[int, int]:
    facts = vvt_facts()['cases'][case]
    return facts['H'], facts['W']


@cache
def qna_tensors() -> dict[str, torch.Tensor]:
    """Inputs, outputs, intermediates, cotangents and gradients by `<case>/...`, parameters by `params:<set>/<path>`."""
    return load_file(QNA / 'golden.safetensors')


@cache
def qna_cases() -> dict[str, dict]:
    """Facts of each case by name."""
    return {case['name']: case for case in json.loads((QNA / 'golden.json').read_text())['cases']}


@cache
def qna_state_shapes() -> dict:
    return json.loads((QNA / 'state_shapes.json').read_text())


def qna_part(prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of `<prefix>/<key>` by key, such as those of 'params:<set>'."""
    prefix = prefix.rstrip('/') + '/'
    return {k[len(prefix):]: v for k, v in qna_tensors().items() if k.startswith(prefix)}


def qna_layer(params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters, or gradients, of the authors' learned-query layer under our names and in our layout."""
    out = {}
    for key, value in params.items():
        if key == 'query':
            out['query'] = value
        elif key == 'Wk_b':
            out['k.bias'] = value.flatten()
        elif key in ('rpe_bias', 'attn_scale_weights'):  # taps by (queries, heads)
            taps = value.flatten(0, -2)
            k = math.isqrt(len(taps))
            out['rel_pos_bias' if key == 'rpe_bias' else 'attn_scale'] = taps.t().reshape(-1, 1, k, k)
        elif key.endswith('bias'):
            out[{'to_v/bias': 'v.bias', 'to_out/bias': 'proj.bias'}[key]] = value
        else:
            out[{'Wk': 'k.weight', 'to_v/kernel': 'v.weight', 'to_out/kernel': 'proj.weight'}[key]] = value.t()
    return {k: v.contiguous() for k, v in out.items()}


@cache
def castling_tensors() -> dict[str, torch.Tensor]:
    """Inputs, outputs, intermediates, cotangents and gradients by `<case>/...`, parameters by `<set>/<name>`."""
    return load_file(CASTLING / 'golden.safetensors')


@cache
def castling_cases() -> dict[str, dict]:
    """Facts of each case by name, with those of its parameters as 'constructor'."""
    facts = json.loads((CASTLING / 'golden.json').read_text())
    sets = facts['param_sets']
    return {case['name']: {**sets.get(case['params'], {}), **case} for case in facts['cases']}


def castling_part(prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of `<prefix>/<key>` by key, such as those of 'params:<set>'."""
    prefix = prefix.rstrip('/') + '/'
    return {k[len(prefix):]: v for k, v in castling_tensors().items() if k.startswith(prefix)}
