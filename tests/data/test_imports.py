import subprocess
import sys

MODULES = ("order", "records", "sources", "template", "tokenize", "tokenizer", "row_tokenizer", "loader")


def test_the_data_layer_loads_neither_torch_nor_transformers() -> None:
    """Importing the data layer takes milliseconds: torch, transformers and pyarrow stay out."""
    imports = "; ".join(f"import onward.data.{name}" for name in MODULES)
    program = f"import sys; {imports}; print([n for n in ('torch', 'transformers', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout
