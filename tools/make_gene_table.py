"""Make the gene table that travels with the package: ``python tools/make_gene_table.py``.

Source: the NCBI Gene search "genetype protein coding, taxonomy 9606, alive" of 22 February 2016 (20,913 genes), as
shipped in the package goatools (made with 1.6.7; BSD licence; module ``goatools.test_data``, see ``MODULE``). NCBI's
data are in the public domain.

Written: ``scsae_utils/data/genes.tsv.gz``, UTF-8, tab-separated, unquoted, one row a gene, sorted by symbol;
designations and aliases are separated by ``|``. It has no Ensembl ids, because the source has none. The same source
gives the same bytes. goatools is needed only here.
"""

from __future__ import annotations

import argparse
import gzip
import html
from importlib import import_module
from pathlib import Path

MODULE = "goatools.test_data.genes_NCBI_9606_ProteinCoding"
TARGET = Path(__file__).parent.parent / "scsae_utils" / "data" / "genes.tsv.gz"
COLUMNS = ("symbol", "entrez", "name", "designations", "aliases")


def clean(text: str) -> str:
    """One line of plain text: no HTML entities, tabs or line ends."""
    return " ".join(html.unescape(text).split())


def table_bytes() -> bytes:
    """The compressed table."""
    genes = sorted(import_module(MODULE).GENEID2NT.values(), key=lambda gene: gene.Symbol)
    symbols = [gene.Symbol for gene in genes]
    if len(set(symbols)) < len(symbols):
        raise ValueError("the source lists a symbol twice")
    rows = [
        (gene.Symbol, str(gene.GeneID), gene.description, gene.other_designations, gene.Aliases.replace(", ", "|"))
        for gene in genes
    ]
    text = "".join("\t".join(map(clean, row)) + "\n" for row in [COLUMNS, *rows])
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the shipped table differs")
    content = table_bytes()
    if parser.parse_args().check:
        if gzip.decompress(TARGET.read_bytes()) != gzip.decompress(content):
            raise SystemExit(f"{TARGET.name} is not what the source gives: run this tool without --check")
    else:
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_bytes(content)
