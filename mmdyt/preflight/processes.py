"""Distributed runs without GPUs."""

import atexit
import logging
import os
import sys

import torch
from mmengine.config import Config
from mmengine.logging import print_log


def use_cpu_processes(cfg: Config) -> None:
    """Prepare a distributed run without GPUs: mmengine's own set-up and SyncBN insist on CUDA devices."""
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    torch.distributed.init_process_group(backend='gloo')
    # gloo's threads abort the process if they are still there when the interpreter ends
    atexit.register(torch.distributed.destroy_process_group)
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    if _replace_type(cfg.model, 'SyncBN', 'BN'):
        print_log('No GPU: SyncBN became BN, so each process normalises its own images.', level=logging.WARNING)


def end_cpu_processes() -> None:
    """End a distributed run without GPUs that has done its work; nothing to do for others.

    Now and then a thread of gloo outlives its group, and the interpreter's own end would abort the process over it. So
    the process leaves without that end, once all that it wrote is on disk.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != 'gloo':
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _replace_type(node, old: str, new: str) -> int:
    """Rename a ``type`` everywhere in a config; return how often."""
    if isinstance(node, list | tuple):
        return sum(_replace_type(value, old, new) for value in node)
    if not isinstance(node, dict):
        return 0
    here = int(node.get('type') == old)
    if here:
        node['type'] = new
    return here + sum(_replace_type(value, old, new) for value in node.values())
