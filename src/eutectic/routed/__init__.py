"""Routed models: a merged base, thin experts beside it, and a decision per sample."""

from eutectic.routed.build import build_routed
from eutectic.routed.head_files import find_heads
from eutectic.routed.heads import Prediction, predict
from eutectic.routed.routed_folder import export_lora, load_routed
from eutectic.routed.routed_layers import RoutedCosts, routed_costs
from eutectic.routed.routed_modules import RoutedAttention, RoutedLinear
from eutectic.routed.router import DiscriminantRouter, PrototypeRouter
from eutectic.routed.router_quality import RouterQuality, estimated_quality, router_quality
from eutectic.routed.routing_modes import routing, routing_accuracy, routing_accuracy_by_task

__all__ = [
    "DiscriminantRouter",
    "Prediction",
    "PrototypeRouter",
    "RoutedAttention",
    "RoutedCosts",
    "RoutedLinear",
    "RouterQuality",
    "build_routed",
    "estimated_quality",
    "export_lora",
    "find_heads",
    "load_routed",
    "predict",
    "routed_costs",
    "router_quality",
    "routing",
    "routing_accuracy",
    "routing_accuracy_by_task",
]
