"""What a persistent kernel whose clusters split the hidden dimension over their CTAs shares: items, synchronisation."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32


class Work(NamedTuple):
    """Which tokens this cluster takes, and this CTA's part of them."""

    rank: Int32  # of the CTA in its cluster
    first: Int32
    step: Int32
    items: Int32
    tokens: Int32  # T

    def item(self, turn: Int32) -> Int32:
        return self.first + turn * self.step


def cluster_work(cluster: int, tokens: Int32) -> Work:
    """By each role for itself: kept across the roles' branch, its numbers were spilled for want of producer registers."""
    rank, first, step = cluster_place(cluster)
    return Work(rank, first, step, (tokens - first + step - 1) // step, tokens)


class Queue(NamedTuple):
    """Items that clusters take one after the other, as each gets ready for its next."""

    rank: Int32  # of the CTA in its cluster
    first: Int32  # this cluster's first item
    clusters: Int32
    items: Int32
    tokens: Int32  # T


def cluster_queue(cluster: int, tokens: Int32, tokens_per_item: int) -> Queue:
    """By each role for itself, as cluster_work."""
    rank, first, clusters = cluster_place(cluster)
    return Queue(rank, first, clusters, (tokens + (tokens_per_item - 1)) // tokens_per_item, tokens)


def cluster_place(cluster: int) -> tuple[Int32, Int32, Int32]:
    """(this CTA's rank in its cluster, the cluster's number, how many clusters there are)."""
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    return cute.arch.block_idx_in_cluster() if cluster > 1 else Int32(0), block // cluster, blocks // cluster


def sync_cluster(cluster: int) -> None:
    """All threads of the cluster."""
    cute.arch.sync_warp()
    if cluster > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.barrier()
