"""Gives a model its KV policy, so that plain `generate()` keeps the cache packed.

Handles work only where an attention layer hands what `update` returned straight to the attention
function and looks at it nowhere else. Whether a class does is read from its source: after

    k, v = cache.update(k, v, …)

each use of k and v must be an argument of `attention_interface(self, q, k, v, …)`, whose keywords
must all be known here. Every other class (latent attention expands what it cached, models that
share keys between layers keep them) gets decoded tensors under its own attention function: slower,
the same figures. A class whose source cannot be read counts as one of those.

An attention that the caller chose, one other than what the class takes by itself, stays: such a
model reads decoded tensors too. A cache that the caller passes, or names with
`cache_implementation`, is left alone; where the checkpoint names one, a warning tells so.
"""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import RecipeError
from .kv_attention import NAME, register
from .kv_policy import KVPolicy

_KEYWORDS = {
    "dropout",
    "scaling",
    "sliding_window",
    "softcap",
    "s_aux",
    "is_causal",
    "position_ids",
}


def install(model: Any, policy: KVPolicy) -> None:
    """Make `model.generate()` use a packed KV cache under `policy`, unless told otherwise.

    RecipeError: an encoder-decoder, or a model without the library's key-value cache. A model none
    of whose layers has full attention only warns: its cache is bounded already.
    """
    text = model.config.get_text_config(decoder=True)
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise RecipeError(
            f"[kv]: {kind} is an encoder-decoder; a packed KV cache exists for decoder-only models"
        )
    if not hasattr(model, "_prepare_cache_for_generation") or not (
        model._supports_default_dynamic_cache()
    ):
        raise RecipeError(
            f"[kv]: {kind} does not use the library's key-value cache; drop [kv] from the recipe"
        )
    if not n_packed_layers(model):
        warnings.warn(
            f"[kv] changes nothing: no layer of {kind} has full attention over an unbounded cache",
            RuntimeWarning,
            stacklevel=2,
        )
    if takes_handles(model) and _attention_is_free(model, text):
        register()
        _set_attention(model, text)
    model.fewbit_kv = policy
    model._prepare_cache_for_generation = _CacheMaker(model)


def model_policy(model: Any) -> KVPolicy | None:
    """The policy that `install` gave the model."""
    policy = getattr(model, "fewbit_kv", None)
    return policy if isinstance(policy, KVPolicy) else None


def new_cache(model: Any, max_tokens: int = 0, starts: torch.Tensor | None = None) -> Any:
    """An empty cache for `model(..., past_key_values=cache)`: packed if it has a policy.

    max_tokens: reserved for each row. starts: first real token of each row, int64 [B].
    """
    from transformers import DynamicCache

    from .kv_cache import KVCache

    policy, text = model_policy(model), model.config.get_text_config(decoder=True)
    if policy is None:
        return DynamicCache(config=text)
    return KVCache(text, policy, max_tokens, starts, text._attn_implementation == NAME)


def n_packed_layers(model: Any) -> int:
    """Layers whose keys and values a policy applies to."""
    from transformers import DynamicCache

    from .kv_cache import is_packed

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return sum(map(is_packed, cache.layers))


def _attention_is_free(model: Any, text: Any) -> bool:
    """Whether nobody chose the attention: it is ours, or what the class takes unless told."""
    return text._attn_implementation in (NAME, model.get_correct_attn_implementation(None))


def _set_attention(model: Any, text: Any) -> None:
    if text is model.config:
        model.set_attn_implementation(NAME)
        return
    part = next(key for key in model.config.sub_configs if getattr(model.config, key) is text)
    model.set_attn_implementation({part: NAME})


class _CacheMaker:
    """Stands in for a model's `_prepare_cache_for_generation`, which makes a `generate()` its cache.

    An object, because a bound method of another name does not survive pickling.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.told = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model can be unpickled where nothing has registered its attention yet."""
        self.__dict__.update(state)
        register()

    # The library's signature.
    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        model, given = self.model, model_kwargs.get("past_key_values")
        type(model)._prepare_cache_for_generation(
            model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = model_kwargs.get("past_key_values")
        if made is None or made is given:
            return
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            self._tell(asked)
            return
        mask = model_kwargs.get("attention_mask")
        starts = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            starts = (mask > 0).int().argmax(dim=1)
        cache = new_cache(model, max_cache_length, starts)
        if generation_config.is_assistant:
            cache.activate_past_recording()  # as the library did with its own
        model_kwargs["past_key_values"] = cache

    def _tell(self, asked: str) -> None:
        """Warn once if not the caller but the model's own settings keep the policy out."""
        if self.told or self.model.generation_config.cache_implementation != asked:
            return
        self.told = True
        warnings.warn(
            f"the model's generation settings have cache_implementation {asked!r}, so generate() "
            f"does not use its packed KV cache; set model.generation_config.cache_implementation "
            f"to None",
            RuntimeWarning,
            stacklevel=4,
        )


def takes_handles(model: Any) -> bool:
    """Whether every attention layer only passes cached keys and values on; see the module's text."""
    kinds = {type(module) for module in model.modules()}
    updating = [kind for kind in kinds if any(map(_updates_a_cache, _methods(kind)))]
    return bool(updating) and all(_passes_through(kind) for kind in updating)


def _methods(kind: type[Any]) -> Iterator[Callable[..., Any]]:
    """Methods that a module's class defines or inherits; not those of the libraries' base classes."""
    for base in kind.__mro__:
        name = base.__module__ + "."
        library = name.startswith(("torch.", "transformers.", "builtins."))
        if not library or name.startswith("transformers.models."):
            yield from (item for item in vars(base).values() if inspect.isfunction(item))


def _passes_through(kind: type[Any]) -> bool:
    forward = inspect.unwrap(kind.forward)
    others = (item for item in _methods(kind) if item.__name__ != "forward")
    return passes_through(forward) and not any(map(_updates_a_cache, others))


def _updates_a_cache(method: Callable[..., Any]) -> bool:
    tree = _tree(method)
    return tree is None or any(_is_update(node) for node in ast.walk(tree))


def _tree(forward: Callable[..., Any]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):  # no source, or not Python source
        return None


def _is_update(node: ast.AST) -> bool:
    """`x.update(k, v, …)` with at least keys and values."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and len(node.args) >= 2
    )


def passes_through(forward: Callable[..., Any]) -> bool:
    """Whether a forward gives what `update` returned to the attention function and nothing else."""
    tree = _tree(forward)
    if tree is None or any(isinstance(node, (ast.For, ast.While)) for node in ast.walk(tree)):
        return False
    updates = [node for node in ast.walk(tree) if _is_update(node)]
    found = [
        node for node in ast.walk(tree) if isinstance(node, ast.Assign) and _is_update(node.value)
    ]
    if len(updates) != 1 or len(found) != 1 or not isinstance(found[0].targets[0], ast.Tuple):
        return False
    names = [ast.unparse(item) for item in found[0].targets[0].elts]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "attention_interface"
    ]
    if len(calls) != 1 or not all(name.isidentifier() for name in names):
        return False
    if [ast.unparse(item) for item in calls[0].args[2:4]] != names:
        return False
    if not {word.arg for word in calls[0].keywords} <= _KEYWORDS | {None}:
        return False
    passed = {id(item) for item in calls[0].args}
    end = found[0].end_lineno or found[0].lineno
    later = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in names and node.lineno > end
    ]
    return all(id(node) in passed for node in later)
