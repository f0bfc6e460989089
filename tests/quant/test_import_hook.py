"""The library knows our checkpoints whichever is imported first, and not without us."""

import subprocess
import sys

import pytest

from fewbit import quant
from tiny_models import save

LOAD = (
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
)
BEFORE = "import sys\nfrom fewbit import quant\nfrom transformers import AutoModelForCausalLM\n"
AFTER = "import sys\nfrom transformers import AutoModelForCausalLM\nfrom fewbit import quant\n"
LOADED_BEFORE = (
    "import sys, transformers.modeling_utils\nfrom transformers import AutoModelForCausalLM\n"
    "from fewbit import quant\n"
)
WITHOUT = "import sys\nfrom transformers import AutoModelForCausalLM\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    quant.quantize(save("llama", folder / "source"), folder / "out", recipe="w8a16")
    return folder / "out"


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("imports", [BEFORE, AFTER, LOADED_BEFORE])
def test_both_orders(imports, out):
    done = run(imports + LOAD, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantLinear"


def test_without_us_the_library_loads_random_weights(out):
    """Pinned, because every model card has to warn of it: it only warns, and goes on."""
    done = run(WITHOUT + LOAD, out)
    assert done.returncode == 0 and done.stdout.strip() == "Linear"
    assert "Unknown quantization type, got fewbit" in done.stderr
    assert "we will skip the quantization" in done.stderr
    assert "newly initialized because missing from the checkpoint" in done.stderr


def test_the_hook_is_light_and_leaves():
    code = (
        "import sys\n"
        "before = list(sys.meta_path)\n"
        "from fewbit import quant\n"
        "quant_hooks = [f for f in sys.meta_path if f not in before]\n"
        "assert [type(f).__name__ for f in quant_hooks] == ['_Finder'], quant_hooks\n"
        "from fewbit.quant.import_hook import install\n"
        "install()\n"
        "assert len(sys.meta_path) == len(before) + 1\n"
        "import importlib.util\n"
        "assert 'torch' not in sys.modules\n"
        "import transformers.modeling_utils as m\n"
        "assert sys.meta_path == [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
        "assert type(m.__loader__).__name__ == 'SourceFileLoader', m.__loader__\n"
        "assert m.__spec__.loader is m.__loader__\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'fewbit' in AUTO_QUANTIZER_MAPPING\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_looking_for_the_module_does_not_use_the_hook_up():
    code = (
        "from fewbit import quant\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('transformers.modeling_utils') is not None\n"
        "import transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'fewbit' in AUTO_QUANTIZER_MAPPING\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_threads_that_import_at_the_same_time(out):
    code = (
        "import sys, threading, transformers\n"  # its lazy names are not made for threads
        "from transformers import AutoModelForCausalLM\n"
        "from fewbit import quant\n"
        "assert 'transformers.modeling_utils' not in sys.modules\n"
        "def by_load():\n"
        "    results.append(quant.load(sys.argv[1]))\n"
        "def by_library():\n"
        "    results.append(AutoModelForCausalLM.from_pretrained(sys.argv[1]))\n"
        "results = []\n"
        "threads = [threading.Thread(target=t) for t in (by_load, by_library) * 2]\n"
        "[t.start() for t in threads]\n"
        "[t.join(60) for t in threads]\n"
        "assert len(results) == 4, results\n"
        "names = {type(m.model.layers[0].mlp.up_proj).__name__ for m in results}\n"
        "assert names == {'QuantLinear'}, names\n"
    )
    done = run(code, out)
    assert done.returncode == 0, done.stderr
