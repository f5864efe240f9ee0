"""The model parallel unit that DeepSpeed asks for its groups, answered by Megatron-core's parallel state."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state as state


class ModelParallelUnit:
    """The names DeepSpeed calls; model parallel is tensor × pipeline, data parallel is data × context."""

    def get_data_parallel_group(self):
        return state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self):
        return state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self):
        return state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group_ranks(self):
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self):
        return state.get_model_parallel_group()

    def get_model_parallel_rank(self):
        return dist.get_rank(state.get_model_parallel_group())

    def get_model_parallel_world_size(self):
        return dist.get_world_size(state.get_model_parallel_group())

    def get_tensor_model_parallel_group(self):
        return state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self):
        return state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self):
        return state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_src_rank(self):
        return state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self):
        return state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_rank(self):
        return state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self):
        return state.get_pipeline_model_parallel_world_size()
