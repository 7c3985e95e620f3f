"""Signed datasets are valid for C2PA's own reader and for `verify`."""

import datetime
import io
import shutil
import subprocess
import sys
from pathlib import Path

import c2pa
import numpy as np
import pytest
import servers
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from making import make_plan, make_shard

from jaxdiff import cli
from jaxdiff.dataset import bucket, formats, ledger, names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.finished import signing
from jaxdiff.dataset.run import open_run
from jaxdiff.errors import InputError
from jaxdiff.images import image_files

PEM = serialization.Encoding.PEM
KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
}
ISSUER = KEYS["es256"]()
SIGNER = KEYS["es256"]()
SETTINGS = {
    **{"prompt": "ein Stern 🌟", "negative_prompt": "", "seed": 7, "width": 24, "height": 16},
    **{"steps": 20, "guidance_scale": 5.0, "sampler": "ddim", "model": "0123456789abcdef"},
}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def certificate(subject: str, key, issuer: str, issuer_key, years=20, usage="EMAIL_PROTECTION"):
    """Returns a certificate that C2PA accepts; an authority's if it is its own issuer."""
    authority = subject == issuer
    name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (subject, issuer)]
    begin = datetime.datetime.now() - datetime.timedelta(days=400)
    bits = ("digital_signature", "key_cert_sign", "crl_sign", "content_commitment")
    others = ("key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    uses = dict.fromkeys((*bits, *others, "decipher_only"), False)
    uses |= {name: authority for name in bits[1:3]} | {"digital_signature": not authority}
    builder = (
        x509.CertificateBuilder(name[1], name[0], key.public_key(), x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.KeyUsage(**uses), True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
    )
    if not authority:
        usage = x509.ExtendedKeyUsage([getattr(ExtendedKeyUsageOID, usage)])
        builder = builder.add_extension(usage, False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem(key, password: bytes | None = None) -> bytes:
    kind = serialization.PrivateFormat.PKCS8
    encryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(PEM, kind, encryption)


@pytest.fixture
def signer(tmp_path):
    """Writes a chain and a key: `signer(key, years=1, ...)` returns their paths."""

    def write(key=SIGNER, **said) -> tuple[Path, Path]:
        leaf = certificate("signer", key, "issuer", ISSUER, **said)
        root = certificate("issuer", ISSUER, "issuer", ISSUER)
        paths = tmp_path / "chain.pem", tmp_path / "key.pem"
        paths[0].write_bytes(leaf.public_bytes(PEM) + root.public_bytes(PEM))
        paths[1].write_bytes(pem(key))
        return paths

    return write


def manifest_of(image: bytes, image_format: str) -> tuple[str, dict]:
    with c2pa.Reader(f"image/{image_format}", io.BytesIO(image)) as reader:
        return reader.get_validation_state(), reader.get_active_manifest()


SOURCE = image_files.source_type(SETTINGS)


def samples(directory: Path) -> list[formats.Sample]:
    run = open_run(directory)
    read = formats.FORMATS[run.plan.settings.format].read
    return [one for path in sorted((directory / "data").iterdir()) for one in read(path)]


@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_a_signed_image_names_jaxdiff_and_is_otherwise_unchanged(signer, image_format):
    image = image_files.encode(PIXELS, SETTINGS, image_format)
    assert not signing.is_signed(image, image_format)
    signed = signing.sign(image, image_format, signing.open_signer(*signer()), SOURCE)
    assert signing.is_signed(signed, image_format)
    state, manifest = manifest_of(signed, image_format)
    assert state == "Valid"
    (actions,) = manifest["assertions"]
    (action,) = actions["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == SOURCE
    assert action["softwareAgent"]["name"] == manifest["claim_generator_info"][0]["name"]
    assert action["softwareAgent"]["name"] == "jaxdiff"
    assert (image_files.decode(signed) == image_files.decode(image)).all()
    before, after = (image_files.Image.open(io.BytesIO(content)) for content in (image, signed))
    assert after.getxmp() == before.getxmp()
    assert after.getexif() == before.getexif()
    assert getattr(after, "text", None) == getattr(before, "text", None)


def test_a_changed_pixel_is_detected(signer):
    signed = bytearray(
        signing.sign(
            image_files.encode(PIXELS, SETTINGS, "png"),
            "png",
            signing.open_signer(*signer()),
            SOURCE,
        )
    )
    signed[-40] ^= 1
    assert manifest_of(bytes(signed), "png")[0] == "Invalid"


@pytest.mark.parametrize("algorithm", KEYS)
def test_every_supported_kind_of_key_can_sign(signer, algorithm):
    opened = signing.open_signer(*signer(KEYS[algorithm]()))
    signed = signing.sign(image_files.encode(PIXELS, SETTINGS, "png"), "png", opened, SOURCE)
    state, manifest = manifest_of(signed, "png")
    assert (state, manifest["signature_info"]["alg"].lower()) == ("Valid", algorithm)


def test_a_key_in_openssl_s_traditional_format_can_sign(signer):
    chain, key = signer()
    old = serialization.PrivateFormat.TraditionalOpenSSL
    key.write_bytes(SIGNER.private_bytes(PEM, old, serialization.NoEncryption()))
    assert signing.open_signer(chain, key)


@pytest.mark.parametrize("format_", formats.FORMATS)
@pytest.mark.parametrize("image_format", image_files.EXTENSIONS)
def test_a_signed_dataset_verifies(finished, signer, format_, image_format):
    directory = finished(format=format_, image_format=image_format, failing=["000000001"])
    before = samples(directory)
    assert signing.sign_dataset(directory, *signer()) == 8
    counts, wrong = ledger.verify(directory)
    assert wrong == []
    assert (counts["made"], counts["failed"]) == (8, 1)
    for old, new in zip(before, samples(directory), strict=True):
        assert manifest_of(new.image, image_format)[0] == "Valid"
        assert new.record["pixel_sha256"] == old.record["pixel_sha256"]
        assert new.record["sha256"] != old.record["sha256"]
        unsigned = {**new.record, "sha256": old.record["sha256"]}
        assert unsigned == old.record
    assert not (directory / names.TMP).exists()


def contents(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_signing_twice_changes_nothing(finished, signer):
    directory = finished()
    assert signing.sign_dataset(directory, *signer()) == 9
    before = contents(directory)
    assert signing.sign_dataset(directory, *signer()) == 0
    assert contents(directory) == before


def test_only_unsigned_images_are_signed(finished, signer):
    directory = finished()
    opened = signing.open_signer(*signer())
    first = samples(directory)[0]
    run = open_run(directory)
    marker = shards.read_marker(run, 0)
    with shards.Attempt(run, 0, marker.revision + 1) as attempt:
        for sample in samples(directory)[:4]:
            attempt.add(signing._signed(sample, "png", opened) if sample == first else sample)
        attempt.commit(marker.facts)
    ledger.finalize(run, 0.0)
    kept = samples(directory)[0]
    assert signing.sign_dataset(directory, *signer()) == 8
    assert samples(directory)[0] == kept
    assert ledger.verify(directory)[1] == []


DYING = """
import os, sys
from pathlib import Path
from jaxdiff.dataset import ledger, paths
from jaxdiff.dataset.finished import signing

name, last, *arguments = sys.argv[1:]
module = {"replace": paths, "finalize": ledger, "sign": signing}[name]
original, calls = getattr(module, name), []

def dying(*arguments):
    calls.append(arguments)
    if len(calls) == int(last):
        os._exit(9)
    return original(*arguments)

setattr(module, name, dying)
signing.sign_dataset(*map(Path, arguments))
"""


@pytest.mark.parametrize("format_", ["webdataset", "imagefolder"])
@pytest.mark.parametrize(
    ("name", "last", "left"),
    [
        ("sign", 7, 5),  # the test image, the first shard's four, the second shard's second
        ("replace", 3, 5),  # the first shard's marker exists, its files do not
        ("replace", 4, 5),  # its images exist, its metadata do not
        ("finalize", 1, 0),
    ],
)
def test_killed_signing_resumes(finished, signer, name, last, left, format_):
    directory = finished(format=format_)
    arguments = [name, str(last), directory, *signer()]
    ended = subprocess.run([sys.executable, "-c", DYING, *arguments], check=False)
    assert ended.returncode == 9
    assert not (directory / "_SUCCESS").exists()
    assert signing.sign_dataset(directory, *signer()) == left
    assert ledger.verify(directory)[1] == []
    assert all(signing.is_signed(sample.image, "png") for sample in samples(directory))
    assert not (directory / names.TMP).exists()


def test_a_changed_dataset_is_not_signed(finished, signer):
    directory = finished()
    path = directory / "data" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"data/train-00001.tar is missing or has changed"):
        signing.sign_dataset(directory, *signer())


def test_an_unfinished_dataset_is_rejected(tmp_path, manifest, tiny_checkpoint, signer):
    directory = tmp_path / "out"
    run = make_plan(directory, manifest, tiny_checkpoint, images_per_shard=4, batch_size=2)
    make_shard(run, 0)
    before = contents(directory)
    with pytest.raises(InputError, match="2 of 3 shards are missing; run the same generate"):
        signing.sign_dataset(directory, *signer())
    assert contents(directory) == before


def test_a_directory_that_another_process_has_locked_is_rejected(finished, signer):
    directory = finished()
    hold = f"""
import sys
from pathlib import Path
from jaxdiff.dataset.local import LocalStore
with LocalStore(Path({str(directory)!r})).held():
    print("held", flush=True)
    sys.stdin.read()
"""
    holding = [sys.executable, "-c", hold]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"process {other.pid} on .* is writing here"):
            signing.sign_dataset(directory, *signer())
        other.stdin.close()
    assert signing.sign_dataset(directory, *signer()) == 9


def test_a_dataset_in_a_bucket_is_signed_by_revisions(
    tmp_path, manifest, tiny_checkpoint, signer, monkeypatch
):
    with servers.moto(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket._client.cache_clear()
        address = server.address("signed")
        run = make_plan(address, manifest, tiny_checkpoint, images_per_shard=4, batch_size=2)
        for shard in run.shards:
            make_shard(run, shard, failing=["000000002"])
        ledger.finalize(run, 0.0)
        assert signing.sign_dataset(address, *signer()) == 8
        assert signing.sign_dataset(address, *signer()) == 0
        counts, problems = ledger.verify(address)
        assert (counts["made"], counts["failed"], problems) == (8, 1, [])
        tars = run.store.entries("data")  # the files of the first revision are gone
        assert [name[:14] for name in tars] == [f"train-{n:05d}-r1" for n in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chain, key: chain.unlink(), "--certificate .*chain.pem cannot be read"),
        (lambda chain, key: chain.write_bytes(b"x"), "chain.pem contains no PEM certificate"),
        (lambda chain, key: key.write_bytes(b"\x00x"), "key.pem contains no PEM private key"),
        (lambda chain, key: key.write_bytes(pem(SIGNER, b"x")), "key.pem is encrypted"),
        (lambda chain, key: key.write_bytes(pem(ISSUER)), "does not match the first certificate"),
    ],
)
def test_files_that_cannot_sign_are_named(signer, change, message):
    chain, key = signer()
    change(chain, key)
    with pytest.raises(InputError, match=message) as caught:
        signing.open_signer(chain, key)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("said", [{"years": 1}, {"usage": "CLIENT_AUTH"}])
def test_a_certificate_that_c2pa_rejects_leaves_the_dataset_unchanged(finished, signer, said):
    directory = finished()
    before = contents(directory)
    with pytest.raises(InputError, match=r"cannot sign \(.*\); C2PA needs a currently valid"):
        signing.sign_dataset(directory, *signer(**said))
    assert contents(directory) == before


def test_an_unsupported_kind_of_key_is_rejected(signer):
    with pytest.raises(InputError, match="must be a P-256, P-384, P-521, Ed25519 or RSA key"):
        signing.open_signer(*signer(ec.generate_private_key(ec.SECP256K1())))


def test_the_command_reports_how_many_images_it_signed(finished, signer, capsys):
    directory = finished()
    chain, key = map(str, signer())
    command = ["sign", str(directory), "--certificate", chain, "--key", key]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{directory}: signed 9 images\n"
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{directory}: every image is already signed\n"
    assert cli.main(["verify", str(directory)]) == 0
    shutil.rmtree(directory)
    assert cli.main(command) == 2
    assert "holds no jaxdiff run" in capsys.readouterr().err
    assert not directory.exists()


def test_without_c2pa_the_command_names_the_package_to_install():
    code = """
import sys
sys.modules["c2pa"] = None
from jaxdiff import cli
sys.exit(cli.main(["sign", "x", "--certificate", "x", "--key", "x"]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "pip install jaxdiff[c2pa]" in ended.stderr
    assert ended.stderr.count("\n") == 1
