import pkgutil
import subprocess
import sys

import onward.data


def test_the_data_layer_loads_neither_torch_nor_transformers() -> None:
    """Importing all of the data layer takes milliseconds: torch, transformers and pyarrow stay out."""
    names = [module.name for module in pkgutil.walk_packages(onward.data.__path__, "onward.data.") if not module.ispkg]
    assert {"onward.data.plan.order", "onward.data.files.sources", "onward.data.rows.records"} <= set(names)
    imports = "; ".join(f"import {name}" for name in names)
    program = f"import sys; {imports}; print([n for n in ('torch', 'transformers', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout
