"""Print the README's table of networks: parameters, multiply-adds and activations, counted, beside published errors.

    python examples/model_table.py

Multiply-adds (GMAC) and activations (millions of values that convolutions and linear layers put out, as in timm's
result tables) are those of one image at the size given.
"""
import timm
import torch
from common import PUBLISHED
from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    """Counts multiply-adds and output values of the convolutions and linear layers that run under it."""

    def __init__(self):
        super().__init__()
        self.macs = self.activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.macs += out.numel() * args[1][0].numel()
            self.activations += out.numel()
        elif func is torch.ops.aten.addmm.default:
            self.macs += out.numel() * args[1].shape[1]
            self.activations += out.numel()
        return out


def main() -> None:
    print('| model | image | parameters | GMAC | activations (M) | published error (%) |')
    print('|---|---|---|---|---|---|')
    for name in timm.list_models(module='gunn'):
        model = timm.create_model(name, fused=False, device='meta').eval()  # the operations one by one
        size = model.default_cfg['input_size']
        with torch.no_grad(), Counter() as counter:
            model(torch.empty(1, *size, device='meta'))
        published = ', '.join(f'{data} {error:.2f}' for data, error in PUBLISHED[name].items())
        print(f'| `{name}` | {size[1]} | {sum(p.numel() for p in model.parameters()):,} | {counter.macs / 1e9:.2f} | '
              f'{counter.activations / 1e6:.1f} | {published} |')


if __name__ == '__main__':
    main()
