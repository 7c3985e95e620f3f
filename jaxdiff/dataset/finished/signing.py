"""Adds Content Credentials: a signed C2PA manifest in every image of a finished dataset.

The manifest states which software generated the image, with the action `c2pa.created` and IPTC's
digital source type (https://spec.c2pa.org, "Actions"). Signing changes an image's file and its
`sha256`, but neither its pixels nor its text metadata. Each shard is committed as a revision, so
interrupted signing resumes where it stopped. The network is not used.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from jaxdiff.dataset import ledger, names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.errors import InputError
from jaxdiff.images import image_files

try:
    import c2pa
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
except ImportError as problem:
    raise InputError(f"signing needs c2pa-python ({problem}): pip install jaxdiff[c2pa]") from None

CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}
SIGNING = {
    "verify": {"verify_after_sign": True, **OFFLINE},
    "builder": {"thumbnail": {"enabled": False}},
}
READING = {"verify": {"verify_after_reading": False, **OFFLINE}}


def sign_dataset(where: str | Path, certificate: Path, key: Path) -> int:
    """Signs every image of a finished dataset that is not signed yet.

    Args:
      certificate: PEM; the signer's own certificate, then those of its issuers.
      key: PEM; the private key of the first certificate.

    Returns:
      How many images were signed.

    Raises:
      InputError: if there is no finished dataset, another process writes to it, a file in it is not
        what its marker names, or the certificate and the key cannot sign.
    """
    store = open_run(where).store
    signer = open_signer(certificate, key)
    with store.held():
        run = open_run(store)
        if missing := ledger.todo(run):
            raise InputError(
                f"{where} is not finished: {len(missing)} of {len(run.shards)} shards "
                "are missing; run the same generate command to finish it"
            )
        ledger.refuse_damaged(run)
        progress = tqdm(run.shards, "signing", unit=" shards", disable=None)
        signed = sum(_sign_shard(run, shard, signer) for shard in progress)
        if signed or store.kind(names.SUCCESS):
            ledger.finalize(run, _plan_seconds(run))
    return signed


def open_signer(certificate: Path, key: Path) -> "c2pa.Context":
    """Opens a signer for `sign` from two PEM files; raises InputError if they cannot sign."""
    chain, private = _read("--certificate", certificate), _read("--key", key)
    try:
        first, *_ = x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise InputError(f"--certificate {certificate} contains no PEM certificate") from None
    try:
        loaded = serialization.load_pem_private_key(private, password=None)
    except TypeError:
        raise InputError(
            f"--key {key} is encrypted; decrypt it with `openssl pkcs8 -in {key} -out FILE`"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"--key {key} contains no PEM private key") from None
    if loaded.public_key() != first.public_key():
        raise InputError(
            f"--key {key} does not match the first certificate in {certificate}, which must be the "
            "signer's own, followed by those of its issuers"
        )
    pkcs8 = loaded.private_bytes(  # the only form that c2pa-rs reads
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    info = c2pa.C2paSignerInfo(_algorithm(loaded, key), chain, pkcs8, None)
    blank = io.BytesIO()
    Image.new("RGB", (1, 1)).save(blank, "png")
    try:
        settings = c2pa.Settings.from_dict(SIGNING)
        signer = c2pa.Context(settings=settings, signer=c2pa.Signer.from_info(info))
        sign(blank.getvalue(), "png", signer, image_files.source_type({}))
    except c2pa.C2paError as problem:
        raise InputError(
            f"--certificate {certificate} cannot sign ({problem}); C2PA needs a currently valid "
            "certificate for digital signatures, not an authority's, with an extended key usage "
            "like emailProtection"
        ) from None
    return signer


def sign(image: bytes, image_format: str, signer: "c2pa.Context", source_type: str) -> bytes:
    """Returns an image's file with a C2PA manifest added and the rest unchanged.

    Args:
      image: the file's bytes.
      image_format: "png", "webp" or "jpeg".
      signer: as `open_signer` returns it.
      source_type: as in `image_files.source_type`.

    Raises:
      c2pa.C2paError: if the file cannot be read, or the signature is not valid.
    """
    agent = {"name": "jaxdiff", "version": importlib.metadata.version("jaxdiff")}
    created = {
        "action": "c2pa.created",
        "softwareAgent": agent,
        "digitalSourceType": source_type,
    }
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
    manifest = {"claim_generator_info": [agent], "assertions": [actions]}
    signed = io.BytesIO()
    with c2pa.Builder(manifest, context=signer) as builder:
        builder.sign(f"image/{image_format}", io.BytesIO(image), signed)
    return signed.getvalue()


def is_signed(image: bytes, image_format: str) -> bool:
    """Returns whether an image's file contains a C2PA manifest, valid or not."""
    context = c2pa.Context(settings=c2pa.Settings.from_dict(READING))
    reader = c2pa.Reader.try_create(f"image/{image_format}", io.BytesIO(image), context=context)
    with reader or contextlib.nullcontext():
        return reader is not None


def _sign_shard(run: Run, shard: int, signer: "c2pa.Context") -> int:
    """Signs the unsigned images of a shard and commits it; returns how many it signed."""
    marker = shards.read_marker(run, shard)
    shards.publish(run, marker)  # a kill may have left temporary names
    with run.store.fetched(*marker.files) as local:
        here = Run(local, run.plan)
        shards.check_files(here, marker)
        image_format = run.plan.settings.image_format
        every = shards.samples(run, marker, local)
        todo = sum(not is_signed(sample.image, image_format) for sample in every)
        if not todo:
            return 0
        run.store.delete(names.SUCCESS)  # it describes the old files
        samples = shards.samples(run, marker, local)
        rows = pq.read_table(local.path(marker.metadata_name)).to_pylist()
        with shards.Attempt(run, shard, marker.revision + 1) as attempt:
            for image, row in zip(run.planned(shard), rows, strict=True):
                if row["status"] == "made":
                    attempt.add(_signed(next(samples), image_format, signer))
                else:
                    attempt.add_failed(image, row["error"])
            attempt.commit(marker.facts)
    return todo


def _signed(sample: Sample, image_format: str, signer: "c2pa.Context") -> Sample:
    if is_signed(sample.image, image_format):
        return sample
    source_type = image_files.source_type(sample.record)
    content = sign(sample.image, image_format, signer, source_type)
    record = {**sample.record, "sha256": hashlib.sha256(content).hexdigest()}
    return replace(sample, record=record, image=content)


def _plan_seconds(run: Run) -> float:
    """Returns the planning time in the last report, or 0 if there is none."""
    try:
        return float(json.loads(run.store.read(names.REPORT))["seconds"]["plan"])
    except (KeyError, OSError, TypeError, ValueError):
        return 0.0


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise InputError(f"{option} {path} cannot be read ({problem.strerror})") from None


def _algorithm(key, path: Path) -> str:
    """Returns C2PA's name of the signature algorithm for a private key."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise InputError(f"--key {path} must be a P-256, P-384, P-521, Ed25519 or RSA key")
