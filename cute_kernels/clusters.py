"""How many thread block clusters a device holds at once: what a persistent kernel's grid needs to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

EMPTY_KERNEL = b".version 8.0 .target sm_90 .address_size 64 .visible .entry empty() { ret; }\0"


def cluster_count(cluster: int, threads: int, shared_bytes: int, device: torch.device) -> int:
    """How many run at once; one more doubles the time. Clusters of 4 and 8 do not fill every GPC's SMs, and chips differ in
    theirs: the driver knows. (On an H200, 30 clusters of 4 or 15 of 8.)
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if cluster <= 2:
        return sms // cluster
    try:
        return active_clusters(cluster, threads, shared_bytes, device)
    except RuntimeError:  # The driver has no compiler of PTX: a count that fits every H100 and H200.
        return max(sms * 7 // 8 // cluster, 1)


def active_clusters(cluster: int, threads: int, shared_bytes: int, device: torch.device) -> int:
    """What the driver says of an empty kernel of that size; RuntimeError where it cannot."""
    from cuda.bindings import driver

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        error, *results = function(*arguments)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function.__name__}: {error.name}")
        return results[0] if results else None

    with torch.cuda.device(device):
        module = call(driver.cuModuleLoadData, EMPTY_KERNEL)
        kernel = call(driver.cuModuleGetFunction, module, b"empty")
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call(driver.cuFuncSetAttribute, kernel, limit, shared_bytes)
        size = driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = cluster, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
        launch.sharedMemBytes = shared_bytes
        launch.attrs, launch.numAttrs = [size], 1
        count = call(driver.cuOccupancyMaxActiveClusters, kernel, launch)
        call(driver.cuModuleUnload, module)
    return count
