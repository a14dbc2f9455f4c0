"""Encoders of images and texts from files on this machine; nothing is ever fetched, no pickle is ever run.

A model is a folder, or a name that is looked up in the Hugging Face cache or among installed packages that carry one.
The libraries (transformers, timm, open_clip, sentence-transformers) are optional and imported when one is used.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import DataError, naming, show
from .images import Scaling, probe_image, scaled, shorter_side

# Numbers of PIL.Image.Resampling, as preprocessor_config.json gives them.
_RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_NAMED = ("nearest", "bilinear", "bicubic", "lanczos")
_PREPARATIONS = ("preprocessor_config.json", "processor_config.json")
_TFIDF = "tfidf"
# Singular values of TF-IDF's table below this part of the largest are rounding errors: those of texts that differ by a
# word are a hundredth, or a thousandth with a million rows.
_RANK = 1e-6
_OF_ARCHITECTURE = {"num_classes"}


@dataclass(frozen=True)
class VisionEncoder:
    """``encode`` takes normalised images (B, 3, H, W) float32 on the device and gives features (B, D)."""

    name: str
    scaling: Scaling
    encode: Callable[[Tensor], Tensor]
    fingerprint: str


@dataclass(frozen=True)
class TextEncoder:
    """``encode`` takes texts and gives float32 features (N, D); ``fit`` is called with the training texts before."""

    name: str
    fit: Callable[[Sequence[str]], None]
    encode: Callable[[Sequence[str]], NDArray[np.float32]]
    fingerprint: str


def optional(module: str, extra: str) -> Any:
    """An optional library's module.

    Raises:
        DataError: it cannot be imported; says how to get it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when those libraries are imported
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision of another PyTorch raises RuntimeError
        cause = _first_line(error)
        raise DataError(f"{module.partition('.')[0]} is needed and cannot be imported ({cause}): {extra}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def model_folder(name: str, marks: Sequence[str]) -> Path:
    """The folder of a model: a path, else a name in the Hugging Face cache, else a package that carries a model.

    marks: files of which the folder must hold one.

    Raises:
        DataError: there is none; says where to put it.
    """
    places = [Path(name), *_cached(name), *_packaged(name)]
    folders = [place for place in places if os.path.isdir(place)]  # of names that are too long Path.is_dir raises
    for folder in folders:
        if any((folder / mark).is_file() for mark in marks):
            return folder
    if folders:
        raise DataError(f"the folder {folders[0]} holds no model: there is none of {', '.join(marks)}")
    raise DataError(
        f"the model {show(name)} is not on this machine, and nothing is downloaded: give the folder with its "
        f"{marks[0]} and .safetensors, or put it into the Hugging Face cache at {_cache()}"
    )


def _cache() -> Path:
    """Where huggingface_hub keeps models; nobody's home is asked for where the environment names a place."""

    def place(variable: str, otherwise: str) -> str:
        return os.path.expandvars(os.path.expanduser(os.environ.get(variable) or otherwise))

    home = place("HF_HOME", os.path.join(place("XDG_CACHE_HOME", os.path.join("~", ".cache")), "huggingface"))
    return Path(place("HF_HUB_CACHE", os.path.join(home, "hub")))


def _cached(name: str) -> list[Path]:
    """Snapshots of a repository "owner/name" in the cache: that of its branch main first."""
    repository = _cache() / ("models--" + name.replace("/", "--"))
    head = repository / "refs" / "main"
    names = [head.read_text(encoding="utf-8").strip()] if os.path.isfile(head) else []
    return [repository / "snapshots" / n for n in names]


def _packaged(name: str) -> list[Path]:
    """The folder ``model`` of an installed package of that name, as some packages on PyPI carry one."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    return [Path(place) / "model" for place in (spec.submodule_search_locations or ())] if spec else []


def fingerprint(folder_or_file: Path, *more: str) -> str:
    """Tells one model's files from another's by name, size and time of change, without reading the weights.

    What is hidden in a folder is not the model's: a run whose results go there keeps its parts in it.
    """
    files = sorted(folder_or_file.rglob("*")) if folder_or_file.is_dir() else [folder_or_file]
    shown = [f for f in files if not any(p.startswith(".") for p in f.relative_to(folder_or_file).parts)]
    told = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in shown if file.is_file()]
    return hashlib.sha256("\n".join([*told, *more]).encode()).hexdigest()


# ---- vision ----------------------------------------------------------------------------------------------------------


def vision_encoder(name: str, device: torch.device) -> VisionEncoder:
    """Load an encoder of images.

    Args:
        name: a folder or cached name of a transformers, timm or open_clip model, told apart by its configuration
            file; or ``timm:ARCHITECTURE=FILE`` or ``open_clip:ARCHITECTURE=FILE`` with FILE the weights.

    Raises:
        DataError: it is not there, damaged, or its library is missing; it does not take the images that its files
            say, or answers the same one in two ways.
    """
    library, _, rest = name.partition(":")
    if library in ("timm", "open_clip") and "=" in rest:
        architecture, _, file = rest.partition("=")
        if not os.path.isfile(file):
            raise DataError(f"the weights {show(file)} are not there; nothing is downloaded, so put the file in place")
        load = _timm if library == "timm" else _open_clip
        with naming(file):
            return _asked_twice(load(name, architecture, {}, Path(file), device), device)
    folder = model_folder(name, ("config.json", "open_clip_config.json"))
    with naming(folder):
        return _asked_twice(_vision_of_folder(name, folder, device), device)


def _vision_of_folder(name: str, folder: Path, device: torch.device) -> VisionEncoder:
    if (folder / "open_clip_config.json").is_file():
        weights = _weights(folder, "open_clip_model.safetensors")
        return _open_clip(name, f"local-dir:{folder}", {}, weights, device)
    about = _json(folder / "config.json")
    if "architecture" in about:
        return _timm(name, str(about["architecture"]), about, _weights(folder, "model.safetensors"), device)
    return _transformers(name, folder, device)


def _asked_twice(encoder: VisionEncoder, device: torch.device) -> VisionEncoder:
    """The encoder itself, once it has taken an image and said the same of it again."""
    image = prepared(scaled(probe_image(), encoder.scaling)[None], encoder.scaling, device)
    try:
        with torch.inference_mode():
            first, second = (encoder.encode(image).float() for _ in range(2))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"it does not take the images that its files say ({_first_line(error)})") from error
    # A GPU may round one way and the other; what a masked autoencoder hides moves its features by far more.
    if not torch.allclose(first, second, rtol=0.0, atol=1e-3 * float(first.abs().max()), equal_nan=True):
        raise DataError(
            "it says another thing of the same image each time, as models do that hide a part of it (masked "
            "autoencoders); their features would fit no others"
        )
    return encoder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} is not a JSON object")
    return content


def _weights(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise DataError(f"there is no {name}; weights are read from safetensors")
    return folder / name


def _load_state(model: nn.Module, file: Path, may_have: Set[str] = frozenset()) -> None:
    """Load weights strictly, except that the file ``may_have`` some that the model has not (a classifier cut off)."""
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError, EOFError) as error:
        raise DataError(f"{file.name} holds no weights of this architecture, or is damaged") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise DataError(f"{file.name} holds more than weights (a pickle), which is never loaded") from error
    unexpected = [key for key in unexpected if key not in may_have]
    # A weight that stands in several places is one tensor, which a file may name once.
    kept = model.state_dict(keep_vars=True)
    there = {id(tensor) for key, tensor in kept.items() if key not in missing}
    missing = [key for key in missing if id(kept[key]) not in there]
    if missing or unexpected:
        which = f"lacks {missing[0]}" if missing else f"has the unknown {unexpected[0]}"
        raise DataError(f"{file.name} does not fit the architecture: it {which}")


def _timm(name: str, architecture: str, about: dict[str, Any], weights: Path, device: torch.device) -> VisionEncoder:
    timm = optional("timm", "pip install timm (it wants a torchvision that fits your PyTorch)")
    arguments = about.get("model_args") or {}
    # They are the architecture's. Those of create_model itself could name a file of weights, which timm would unpickle.
    others = sorted(inspect.signature(timm.create_model).parameters.keys() & arguments.keys() - _OF_ARCHITECTURE)
    if others or ":" in architecture:
        what = f"model_args of {others[0]!r}" if others else f"the architecture {show(architecture)}"
        raise DataError(
            f"{what} would have timm look for weights elsewhere; give the architecture and its own settings"
        )
    try:
        model = timm.create_model(architecture, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"timm has no architecture {show(architecture)} with these settings") from error
    given = about.get("pretrained_cfg", about)  # in older files they stand beside the architecture
    if not isinstance(given, dict):
        raise DataError(f"config.json's pretrained_cfg is {show(str(given))}, not a table of settings")
    config = {**model.pretrained_cfg, **given}
    # What goes with the classifier may be several (DeiT's second head) and more than linear (LeViT's norm).
    whole = set(model.state_dict())
    model.reset_classifier(0)
    _load_state(model, weights, may_have=whole - set(model.state_dict()))
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash", "border"):
        raise DataError(f"the crop_mode {show(str(mode))} is not known")
    _, height, width = config["input_size"]
    scaling = Scaling(
        height,
        width,
        shorter_side(min(height, width), config["crop_pct"]),
        tuple(config["mean"]),
        tuple(config["std"]),
        _interpolation(config["interpolation"]),
        squash=mode == "squash",
        border=mode == "border",
        fill=_colour(config["mean"]) if mode == "border" else (0, 0, 0),
    )
    made_of = fingerprint(weights, architecture, json.dumps(arguments, sort_keys=True), repr(scaling))
    return VisionEncoder(name, scaling, model.eval().to(device), made_of)


def _open_clip(
    name: str, architecture: str, about: dict[str, Any], weights: Path, device: torch.device
) -> VisionEncoder:
    open_clip = optional("open_clip", "pip install open_clip_torch (it wants a torchvision that fits your PyTorch)")
    try:
        model = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, **about)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"open_clip cannot make this architecture ({_first_line(error)})") from error
    _load_state(model, weights)
    given = open_clip.get_model_preprocess_cfg(model)
    mode = given.get("resize_mode") or "shortest"
    if mode not in ("shortest", "longest", "squash"):
        raise DataError(f"the resize_mode {show(str(mode))} is not known")
    fill = given.get("fill_color") or 0
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    scaling = Scaling(
        height,
        width,
        min(height, width),
        tuple(given["mean"]),
        tuple(given["std"]),
        _interpolation(given.get("interpolation")),
        squash=mode == "squash",
        border=mode == "longest",
        fill=(fill, fill, fill) if isinstance(fill, int) else tuple(fill),
    )
    model = model.eval().to(device)
    made_of = fingerprint(weights, architecture, json.dumps(about, sort_keys=True), repr(scaling))
    return VisionEncoder(name, scaling, model.encode_image, made_of)


def _interpolation(name: Any) -> Any:
    if name in (None, "", "random"):  # "random" is for training
        return "bicubic"
    if name not in _NAMED:
        raise DataError(f"the interpolation {show(str(name))} is not known")
    return name


def _colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """The mean as a colour of bytes."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def _quiet_transformers() -> Any:
    """The library, told to leave the terminal to our own progress bar."""
    transformers = optional("transformers", "pip install 'seda_fast[extract]'")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _transformers(name: str, folder: Path, device: torch.device) -> VisionEncoder:
    transformers = _quiet_transformers()
    scaling = _transformers_scaling(folder, transformers)
    model, lacking = _loaded(transformers.AutoModel, folder)
    if lacking and not _beside_the_pooler(lacking):
        # What was trained as a classifier has none, and a mean over the tokens serves.
        model, lacking = _loaded(transformers.AutoModel, folder, add_pooling_layer=False)
    _refuse_lacking(lacking)
    model = model.eval().to(device)

    def encode(images: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):  # CLIP and its like
            found = model.get_image_features(pixel_values=images)
        else:
            found = model(pixel_values=images)
        if isinstance(found, Tensor):
            return found
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # type: ignore[no-any-return]
        hidden: Tensor = found.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)

    return VisionEncoder(name, scaling, encode, fingerprint(folder))


def _loaded(kind: Any, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """A transformers model of the class ``kind``, and what its files lack, which was drawn at random."""
    try:
        model, told = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"transformers cannot load it ({_first_line(error)})") from error
    return model, sorted(told["missing_keys"])


def _beside_the_pooler(names: Sequence[str]) -> list[str]:
    return [name for name in names if "pooler" not in name.split(".")[:-1]]


def _refuse_lacking(names: Sequence[str]) -> None:
    """A part that is drawn at random is another one each time, and features of two runs would not fit each other."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(f"its weights lack {names[0]}{more}, without which its features mean nothing")


def _transformers_scaling(folder: Path, transformers: Any) -> Scaling:
    """How the model's own image processor prepares images, once its result and ours have been compared.

    A file names little and leaves the rest to its class, and classes differ: in defaults, in what ``size`` means, in
    steps of their own (a share to cut out, channels in another order).
    """
    if not any((folder / name).is_file() for name in _PREPARATIONS):
        raise DataError(f"there is no {' or '.join(_PREPARATIONS)}, which says how the model wants its images")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        scaling = _scaling_of(processor.to_dict())
        probe = probe_image()
        expected = processor(images=probe, return_tensors="pt")["pixel_values"][0]
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        cause = _first_line(error)
        raise DataError(f"its files do not say how the model wants its images ({cause})") from error
    found = prepared(scaled(probe, scaling)[None], scaling, torch.device("cpu"))[0]
    std = torch.tensor(scaling.std)[:, None, None]
    # On a picture of smooth slopes: the cut's edges, which others round to whole pixels, may lie half a pixel apart.
    most = 0.005 + 0.7 / min(scaling.height, scaling.width)
    if expected.shape != found.shape or not float(((expected - found) * std).abs().mean()) <= most:
        kind = type(processor).__name__
        raise DataError(f"{kind} prepares images in a way that is not known here; timm may have the same model")
    return scaling


def _scaling_of(given: dict[str, Any]) -> Scaling:
    """From all settings of an image processor, defaults included."""
    size, crop = given["size"], given.get("crop_size") if given.get("do_center_crop") else None
    if "shortest_edge" in size:
        edge, squash = int(size["shortest_edge"]), False
        height, width = (int(crop["height"]), int(crop["width"])) if crop else (edge, edge)
        if "crop_pct" in given:  # ConvNeXT: the size is that of the cut, unless it is large
            edge, squash = (edge, True) if edge >= 384 else (int(edge / given["crop_pct"]), False)
    else:
        height, width = int(size["height"]), int(size["width"])
        edge, squash = min(height, width), True
    resampling: Any = _RESAMPLINGS[int(given.get("resample", 3))]
    # The features' scale: theirs is (x * factor - mean) / std of bytes x, ours (x / 255 - mean) / std.
    factor = 255 * float(given["rescale_factor"]) if given.get("do_rescale", True) else 255.0
    mean, std = (given["image_mean"], given["image_std"]) if given.get("do_normalize", True) else ([0] * 3, [1] * 3)
    return Scaling(
        height,
        width,
        edge,
        tuple(float(value) / factor for value in mean),
        tuple(float(value) / factor for value in std),
        resampling,
        squash,
    )


def prepared(images: NDArray[np.uint8], scaling: Scaling, device: torch.device) -> Tensor:
    """Scaled images (B, H, W, 3) as a model takes them, (B, 3, H, W) float32 on the device."""
    mean, std = (torch.tensor(values, device=device)[None, :, None, None] for values in (scaling.mean, scaling.std))
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(255)
    return (pixels - mean) / std


# ---- text ------------------------------------------------------------------------------------------------------------


def text_encoder(name: str, device: torch.device, *, dim: int, batch_size: int) -> TextEncoder:
    """Load an encoder of texts.

    Args:
        name: "tfidf" for TF-IDF over words and word pairs with a truncated SVD to at most ``dim`` dimensions, fitted on
            the training texts; else a folder, cached name or package of a sentence-transformers model.

    Raises:
        DataError: it is not there, damaged, or its library is missing.
    """
    if name == _TFIDF:
        return _tfidf(dim)
    folder = model_folder(name, ("modules.json",))
    with naming(folder):
        _refuse_code(folder / "modules.json")
        _quiet_transformers()
        sentence_transformers = optional("sentence_transformers", "pip install 'seda_fast[extract]'")
        try:
            model = sentence_transformers.SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise DataError(f"sentence-transformers cannot load it ({_first_line(error)})") from error
        for path, module in zip(_modules(folder / "modules.json", "path"), model, strict=True):
            _refuse_lacking_texts(folder / path, module)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        given = _as_texts(model, texts)
        found = model.encode(given, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, dtype=np.float32)

    return TextEncoder(name, lambda texts: None, encode, fingerprint(folder))


def _as_texts(model: Iterable[Any], texts: Sequence[str]) -> list[Any]:
    """What makes a model read texts as texts: one of images, too, would load a caption that names a file or an address.
    Those of texts alone take strings, as they always did."""
    first = next(iter(model), None)
    several = set(getattr(first, "modalities", ("text",))) != {"text"}
    return [{"text": text} for text in texts] if several else list(texts)


def _refuse_code(path: Path) -> None:
    """A module of another kind would be imported from wherever the model names it, its own folder among others, even
    without ``trust_remote_code``."""
    other = [module for module in _modules(path, "type") if not module.startswith("sentence_transformers.")]
    if other:
        raise DataError(
            f"{path.name} names {show(other[0])}, code that is not of sentence-transformers and is never run"
        )


def _modules(path: Path, what: str) -> list[str]:
    try:
        return [str(module[what]) for module in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path.name} does not list the model's modules") from error


def _refuse_lacking_texts(folder: Path, module: nn.Module) -> None:
    """sentence-transformers says nothing of weights that a transformers model's file lacks, so that is loaded once
    more. No module of its own reads what a pooler says."""
    transformers = optional("transformers", "pip install 'seda_fast[extract]'")
    found = next((part for part in module.modules() if isinstance(part, transformers.PreTrainedModel)), None)
    if found is not None:
        _refuse_lacking(_beside_the_pooler(_loaded(type(found), folder)[1]))


def _tfidf(dim: int) -> TextEncoder:
    text = optional("sklearn.feature_extraction.text", "pip install 'seda_fast[extract]'")
    decomposition = optional("sklearn.decomposition", "pip install 'seda_fast[extract]'")
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    fitted: list[Any] = []

    def fit(texts: Sequence[str]) -> None:
        try:
            table = words.fit_transform(texts)
        except ValueError as error:  # an empty vocabulary
            raise DataError("the training texts hold no word that TF-IDF could count") from error
        if table.shape[1] < 2:
            raise DataError("the training texts hold one word alone, which tells none of them from another")
        size = min(dim, table.shape[0], table.shape[1])
        svd = decomposition.TruncatedSVD(size, random_state=0).fit(table)
        # Beyond the table's rank it makes up directions, in which the training texts have rounding errors alone and
        # others, divided by the deviation of these, are 1e15.
        svd.components_ = svd.components_[svd.singular_values_ > _RANK * svd.singular_values_[0]]
        fitted.append(svd)

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = fitted[-1].transform(words.transform(texts)).astype(np.float32)
        return found

    return TextEncoder(_TFIDF, fit, encode, f"tfidf within its rank {dim}")
