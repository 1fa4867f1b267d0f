"""Embeds the Serve configs of configs/ into the overlays, with what a cluster must change.

    python k8s/embed.py              # writes k8s/overlays/*/serve.yaml anew
    python k8s/embed.py my.yaml      # prints the same for a config file of your own, for an overlay of your own

tests/pure/test_kubernetes.py fails while an overlay has another config than its file in configs/.
"""

import argparse
import sys
from pathlib import Path

import yaml

from configs.files import read_config, read_document

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = {  # each with its file in configs/
    "demo": "demo.yaml",
    "llama8b": "llama8b_tp1.yaml",
    "llama70b-tp8": "llama70b_tp8.yaml",
    "llama405b-tp8-pp4": "llama405b_tp8_pp4.yaml",
    "autoscaling": "llama8b_autoscaling.yaml",
}
# KubeRay submits as soon as the head runs, and once: what is refused then, as no worker is there yet, stays refused.
WAIT_S = 3600.0


def embedded(path: Path, name: str) -> str:
    """The patch that gives the RayService the Serve config in `path`, which people know by `name`.

    Raises ValueError for a mistake in the file.
    """
    read_config(path)
    document = read_document(path)
    document["proxy_location"] = "EveryNode"  # clients reach the workers' proxies; the head's is left out
    document["http_options"] = document.get("http_options", {}) | {"host": "0.0.0.0"}
    for application in document["applications"]:
        placement = application["args"].setdefault("placement", {})
        placement["wait_s"] = max(placement.get("wait_s", 0.0), WAIT_S)
    config = yaml.safe_dump(document, sort_keys=False, width=120)
    indented = "".join(f"    {line}\n" for line in config.splitlines())
    return (
        f"# Made of {name} by `python k8s/embed.py`; change that file, not this one.\n"
        "apiVersion: ray.io/v1\nkind: RayService\nmetadata:\n  name: stagemesh\nspec:\n  serveConfigV2: |\n" + indented
    )


def main(argv: list[str]) -> int:
    """Write the overlays' configs, or print the one that is asked for. Exit code 2: a mistake in the file."""
    parser = argparse.ArgumentParser(prog="python k8s/embed.py", description="Embed Serve configs into the overlays.")
    parser.add_argument("config", nargs="?", help="print the patch for this file, and write nothing")
    asked = parser.parse_args(argv).config
    try:
        if asked:
            sys.stdout.write(embedded(Path(asked), asked))
        else:
            for overlay, file in OVERLAYS.items():
                text = embedded(ROOT / "configs" / file, f"configs/{file}")
                (ROOT / "k8s" / "overlays" / overlay / "serve.yaml").write_text(text, encoding="utf-8")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
