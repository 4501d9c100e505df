"""Relational message passing (K1): the op, the layer's epilogue, and the graph layout they walk."""

from __future__ import annotations

from ragkit_kernels.relational_conv.epilogue import norm_relu_residual, relu_dot
from ragkit_kernels.relational_conv.layer import relational_layer, relational_layer_, relational_step
from ragkit_kernels.relational_conv.layout import GraphLayout, build_layout
from ragkit_kernels.relational_conv.op import relational_conv
from ragkit_kernels.relational_conv.reference import AGGREGATES, MESSAGES, relational_conv_reference

__all__ = [
    "AGGREGATES",
    "MESSAGES",
    "GraphLayout",
    "build_layout",
    "norm_relu_residual",
    "relational_conv",
    "relational_conv_reference",
    "relational_layer",
    "relational_layer_",
    "relational_step",
    "relu_dot",
]
