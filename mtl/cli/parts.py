"""Parts of a union: names of data options on the command line, whole data nodes in the config of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mtl.cli.explain import translate
from mtl.config.identity import TARGET
from mtl.errors import ConfigError, suggest

KEY, UNION = "data.parts", "mtl.data.union.Union"
LISTED = re.compile(r"\+*data\.parts=\[([\w, -]*)\]")
OF_ONE = re.compile(r"\+*(data\.parts\.[\w-]+[.=].*)", re.DOTALL)
OF_ALL = ("residency", "workers", "eval_batch_size")  # of a part they would mean nothing


def fold(words: Sequence[str]) -> list[str]:
    """Overrides in which parts are a mapping, since Hydra takes no key of a list.

    Example: `data.parts=[rooms,digits] data.parts.rooms.height=32` becomes `data.parts=null
    data.parts={rooms:{},digits:{}} ++data.parts.rooms.height=32`. The null removes the parts of an experiment.
    """
    found = []
    for word in words:
        if listed := LISTED.fullmatch(word):
            names = [name.strip() for name in listed[1].split(",") if name.strip()]
            if twice := next((name for name in names if names.count(name) > 1), None):
                names = f"{KEY}={{NAME: {{_target_: …}}, NAME: {{_target_: …}}}}"
                raise ConfigError(f"{KEY}: {twice} is listed twice; two parts of one kind need names: {names}")
            found += [f"{KEY}=null", f"{KEY}={{{','.join(f'{name}:{{}}' for name in names)}}}"]
        else:
            of_one = OF_ONE.fullmatch(word)
            found.append(f"++{of_one[1]}" if of_one else word)
    return found


def with_parts(config: Mapping[str, Any], hydra: DictConfig) -> dict[str, Any]:
    """The config with a whole data node for each part.

    Args:
        config: resolved, as plain Python objects.
        hydra: Hydra's config, which knows the folders of options.

    Raises:
        ConfigError: a part is no data option, or there is none.
    """
    node = config.get("data")
    if not isinstance(node, Mapping) or node.get(TARGET) != UNION:
        return dict(config)
    parts = node.get("parts")
    if isinstance(parts, list):
        if wrong := [one for one in parts if not isinstance(one, str)]:
            raise ConfigError(f"{KEY}: {wrong[0]!r:.60} is no name of a data option")
        parts = {name: {} for name in parts}
    if not isinstance(parts, Mapping) or not parts:
        raise ConfigError(f"{KEY}: a list of data options is needed, as in {KEY}=[synthetic,rooms]")
    search = ConfigSearchPathImpl()
    for source in hydra.runtime.config_sources:
        search.append(source.provider, f"{source['schema']}://{source.path}")
    loader, base = ConfigLoaderImpl(search), hydra.job.config_name or "config"
    whole = {name: _whole(loader, base, str(name), own or {}) for name, own in parts.items()}
    return {**config, "data": {**node, "parts": whole}}


def _whole(loader: ConfigLoaderImpl, base: str, name: str, own: Any) -> dict[str, Any]:
    """The node of a data option, with the keys that are given for the part."""
    if not isinstance(own, Mapping):
        raise ConfigError(f"{KEY}.{name}={own!r:.60}: a mapping of the part's options is needed, {{KEY: VALUE}}")
    if TARGET not in own:
        options = loader.get_group_options("data")
        if name not in options or name == "union":
            allowed = [one for one in options if one != "union"]
            raise ConfigError(f"{KEY}: {name} is no data option; one of {', '.join(allowed)}{suggest(name, allowed)}")
        try:
            composed = loader.load_configuration(base, [f"data={name}"], RunMode.RUN)
            option = OmegaConf.to_container(composed.data, resolve=True)
        except Exception as error:
            raise translate(error) from error
        own = {**{key: value for key, value in option.items() if key not in OF_ALL}, **own}
    if wrong := next((key for key in OF_ALL if key in own), None):
        raise ConfigError(f"{KEY}.{name}.{wrong}: all parts are read together; set data.{wrong}")
    return dict(own)
