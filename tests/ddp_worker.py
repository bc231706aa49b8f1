"""Run by torch.distributed.run: DistributedDataParallel on two gloo processes against one process on the joined batch.

Does not import the package: every process must find the networks by timm alone.
"""
import copy
import logging
import sys

import timm
import torch
import torch.distributed as dist
from reference import randomise
from torch.nn.parallel import DistributedDataParallel


def network(name: str, **kwargs) -> torch.nn.Module:
    """A small network of random norm parameters and statistics, in float64."""
    torch.manual_seed(0)
    channels = (12, 16, 20, 24)[:4 if '18' in name else 3]
    model = timm.create_model(
        name, channels=channels, segments=(3, 4, 5, 6)[:len(channels)], dtype=torch.float64, **kwargs)
    return randomise(model).train()


def check_synchronised(name: str, rank: int, size: int) -> None:
    """SyncBatchNorm, which PyTorch has for GPUs only (one may serve both): statistics are those of the whole batch."""
    single = network(name).cuda()
    ddp = DistributedDataParallel(torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(single)))
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64).cuda()
    single(x).square().mean().backward()
    ddp(x.chunk(size)[rank]).square().mean().backward()
    for (n, p), q in zip(single.named_parameters(), ddp.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=n: f'{name} {n}: {m}')
    for (n, b), c in zip(single.named_buffers(), ddp.module.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=lambda m, n=n: f'{name} {n}: {m}')


def check_paths(name: str, rank: int) -> None:
    """The fused operator gives what the composite gives, over micro-batches with and without communication."""
    refusals = []
    handler = logging.Handler()
    handler.emit = refusals.append
    logger = logging.getLogger('timm_gunn.layer')
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    ddps = [DistributedDataParallel(network(name, fused=fused)) for fused in (True, False)]
    torch.manual_seed(rank)
    batches = torch.randn(3, 4, 3, 32, 32, dtype=torch.float64)
    for ddp in ddps:
        with ddp.no_sync():
            for x in batches[:2]:
                ddp(x).square().mean().backward()
        ddp(batches[2]).square().mean().backward()
    assert not refusals, refusals  # what the fused layers log when they are not
    fused, composite = (ddp.module for ddp in ddps)
    for (n, p), q in zip(fused.named_parameters(), composite.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=n: f'{name} {n}: {m}')
    torch.testing.assert_close(dict(fused.named_buffers()), dict(composite.named_buffers()))


def main() -> None:
    dist.init_process_group('gloo')
    rank, size = dist.get_rank(), dist.get_world_size()
    if '--sync-bn' in sys.argv:
        for name in ('gunn15', 'sunn15', 'gunn18', 'gunn24'):
            check_synchronised(name, rank, size)
        print(f'process {rank} agrees')
        dist.destroy_process_group()
        return

    for name in ('gunn15', 'sunn15', 'gunn18', 'gunn24'):
        # Statistics of the whole batch cannot differ between one process and two if they are fixed.
        single = timm.layers.freeze_batch_norm_2d(network(name))
        ddp = DistributedDataParallel(copy.deepcopy(single))
        x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
        y = torch.randint(0, single.num_classes, (8,))
        loss = torch.nn.functional.cross_entropy

        # Two micro-batches per process, the first without communication.
        (loss(single(x[:4]), y[:4]) + loss(single(x[4:]), y[4:])).backward()
        with ddp.no_sync():
            loss(ddp(x[:4].chunk(size)[rank]), y[:4].chunk(size)[rank]).backward()
        loss(ddp(x[4:].chunk(size)[rank]), y[4:].chunk(size)[rank]).backward()
        for (n, p), q in zip(single.named_parameters(), ddp.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda m, n=n, name=name: f'{name} {n}: {m}')

    for name in ('gunn15', 'gunn18', 'gunn24'):
        check_paths(name, rank)

    dist.barrier()
    dist.destroy_process_group()
    print(f'process {rank} agrees')


if __name__ == '__main__':
    main()
