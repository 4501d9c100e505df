"""Flower's strategies and privacy wrappers by name, with names and parameters checked."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ragkit.federated.config import FederatedConfig
from ragkit.federated.errors import FederatedError
from ragkit.optional import require

# All of Flower's that average tensors; the ones for trees (FedXgb...) have nothing to do here.
STRATEGIES = (
    "FedAvg",
    "FedProx",
    "FedAdam",
    "FedYogi",
    "FedAdagrad",
    "FedAvgM",
    "FedMedian",
    "FedTrimmedAvg",
    "Krum",
    "MultiKrum",
    "Bulyan",
    "QFedAvg",
)
WRAPPERS = {
    "server-fixed": "DifferentialPrivacyServerSideFixedClipping",
    "server-adaptive": "DifferentialPrivacyServerSideAdaptiveClipping",
    "client-fixed": "DifferentialPrivacyClientSideFixedClipping",
    "client-adaptive": "DifferentialPrivacyClientSideAdaptiveClipping",
}
EXAMPLES = "num-examples"
EQUAL = "equal-weight"
LOCAL_PRIVACY = ("clipping_norm", "sensitivity", "epsilon", "delta")


def make_strategy(config: FederatedConfig, num_clients: int) -> Any:
    """The Flower strategy of the settings, wrapped for privacy where they say so.

    With privacy all clients weigh the same: the noise is calibrated to a mean over clients, and a weight by number of
    rows would let a large client exceed the bound.

    Args:
        config: strategy, strategy_options, privacy, privacy_options, min_clients and client_evaluation are read.
        num_clients: Clients of the federation; from them follows how many are sampled, to which the noise of privacy
            is calibrated where privacy_options name no number.

    Raises:
        FederatedError: An unknown strategy or parameter, or a parameter that Flower refuses.
    """
    library = require("flwr.serverapp.strategy", extra="federated")
    if config.strategy not in STRATEGIES:
        folded = {name.lower(): name for name in STRATEGIES}
        near = difflib.get_close_matches(config.strategy.lower(), folded, n=1)
        hint = f"; did you mean {folded[near[0]]!r}?" if near else ""
        raise FederatedError(f"strategy: found {config.strategy!r}, expected one of {', '.join(STRATEGIES)}{hint}")
    _check_counts(config.strategy_options)
    if config.privacy is None and config.privacy_options:
        raise FederatedError(
            f"privacy_options: found {config.privacy_options}, but no privacy is set: nothing would be private; set "
            "privacy='server-fixed' or another, or leave the options out"
        )
    least = config.min_clients
    if config.privacy in WRAPPERS:
        # With fewer, each one's share in the mean would be larger than what the noise is made to hide.
        sampled = config.privacy_options.get("num_sampled_clients", sampled_clients(config, num_clients))
        least = max(least, sampled) if isinstance(sampled, int) else least
    defaults = {
        "min_train_nodes": least,
        "min_evaluate_nodes": 1,
        "min_available_nodes": least,
        "fraction_evaluate": 1.0 if config.client_evaluation else 0.0,
        "weighted_by_key": EQUAL if config.privacy in WRAPPERS else EXAMPLES,
    }
    strategy = _build(
        getattr(library, config.strategy), {**defaults, **config.strategy_options}, "strategy_options", config.strategy
    )
    if config.strategy == "FedProx" and not config.strategy_options.get("proximal_mu", 0) > 0:
        raise FederatedError(
            "strategy_options: FedProx without a proximal_mu above 0 is FedAvg; give {'proximal_mu': 0.1}, or use "
            "FedAvg"
        )
    if config.privacy is None:
        return strategy
    if config.privacy == "local":
        _check_local(config.privacy_options)
        return strategy
    options = {"num_sampled_clients": sampled_clients(config, num_clients), **config.privacy_options}
    return _build(
        getattr(library, WRAPPERS[config.privacy]), options, "privacy_options", config.privacy, strategy=strategy
    )


def sampled_clients(config: FederatedConfig, num_clients: int) -> int:
    """How many of `num_clients` clients train in a round, as Flower reckons."""
    options = config.strategy_options
    return max(
        int(num_clients * options.get("fraction_train", 1.0)), options.get("min_train_nodes", config.min_clients)
    )


def needed_clients(strategy: Any) -> int:
    """How many clients a strategy waits for before each round."""
    inner = getattr(strategy, "strategy", strategy)
    return max(inner.min_available_nodes, inner.min_train_nodes, inner.min_evaluate_nodes)


def privacy_settings(config: FederatedConfig) -> dict[str, str | float]:
    """What the clients must know of the privacy, for the message's config."""
    if config.privacy is None:
        return {}
    settings: dict[str, str | float] = {"privacy": config.privacy}
    if config.privacy == "local":
        settings |= {f"privacy-{name}": float(config.privacy_options[name]) for name in LOCAL_PRIVACY}
    return settings


def privacy_mod(message: Any, context: Any, call_next: Callable[[Any, Any], Any]) -> Any:
    """The client's side of the privacy that the server's message asks for, by Flower's own modifiers."""
    config = message.content["config"]
    kind = config.get("privacy")
    if kind not in ("client-fixed", "client-adaptive", "local"):
        return call_next(message, context)
    mods = require("flwr.clientapp.mod", extra="federated")
    if kind == "local":
        mod = mods.LocalDpMod(**{name: float(config[f"privacy-{name}"]) for name in LOCAL_PRIVACY})
    else:
        mod = mods.fixedclipping_mod if kind == "client-fixed" else mods.adaptiveclipping_mod
    return mod(message, context, call_next)


def _check_counts(options: Mapping[str, Any]) -> None:
    """Flower takes any number: it then trains nobody, or waits for ever for clients that cannot be."""
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("fraction_train", "fraction_evaluate"):
            if not number or not 0 <= value <= 1 or (name == "fraction_train" and value == 0):
                expected = "a number above 0, up to 1" if name == "fraction_train" else "a number from 0 to 1"
                raise FederatedError(f"strategy_options: {name}: found {value!r}, expected {expected}")
        elif name.startswith("min_") and name.endswith("_nodes") and not (isinstance(value, int) and value >= 0):
            raise FederatedError(f"strategy_options: {name}: found {value!r}, expected a whole number, at least 0")


def _build(kind: Callable[..., Any], options: Mapping[str, Any], setting: str, name: str, **given: Any) -> Any:
    parameters = inspect.signature(kind).parameters
    known = [key for key in parameters if key not in given]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FederatedError(f"{setting}: {name} has no parameter {key!r}; it has {', '.join(known)}{hint}")
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in options and key not in given
    ]
    if missing:
        raise FederatedError(f"{setting}: {name} needs {_and(missing)}; give {setting}={{{missing[0]!r}: ...}}")
    log = logging.getLogger("flwr")
    log.addFilter(_is_news)
    try:
        return kind(**given, **options)
    except (TypeError, ValueError) as error:
        raise FederatedError(f"{setting}: {name} refuses {dict(options)}: {error}") from error
    finally:
        log.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Flower warns where clients do not evaluate; the settings have asked for that."""
    return "Federated evaluation will be skipped" not in record.getMessage()


def _check_local(options: Mapping[str, Any]) -> None:
    wrong = [key for key in options if key not in LOCAL_PRIVACY]
    missing = [key for key in LOCAL_PRIVACY if key not in options]
    if wrong or missing:
        found = f"no parameter {wrong[0]!r} is known" if wrong else f"{_and(missing)} must be given"
        raise FederatedError(f"privacy_options of local privacy: {found}; they are {', '.join(LOCAL_PRIVACY)}")
    mods = require("flwr.clientapp.mod", extra="federated")
    try:
        mods.LocalDpMod(**{name: float(options[name]) for name in LOCAL_PRIVACY})
    except (TypeError, ValueError) as error:
        raise FederatedError(f"privacy_options of local privacy: {dict(options)}: {error}") from error


def _and(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))
