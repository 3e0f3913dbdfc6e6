"""A Sigstore instance of our own: a certificate authority, a certificate log, a signature log.

It makes what the services of Sigstore hand out, by their formats: X.509 with an embedded
timestamp of a certificate log (RFC 6962), Rekor's ``hashedrekord`` entry with its promise,
proof and checkpoint, a bundle (version 0.3) and a trusted root (version 0.1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
BEGUN = datetime(2026, 1, 1, tzinfo=timezone.utc)
SIGNED = BEGUN + timedelta(days=1)
LOG = "log.example.org"
KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
HASH = hashes.SHA256()


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a new key."""
    return ec.generate_private_key(ec.SECP256R1())


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public part of a key in DER."""
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def text(content: bytes) -> str:
    """Return bytes as they are in JSON."""
    return base64.b64encode(content).decode("ascii")


def usages(*granted: str) -> x509.KeyUsage:
    """Return the extension that says what a certificate's key may do."""
    return x509.KeyUsage(**{name: name in granted for name in KEY_USAGES})


@dataclass(frozen=True)
class Instance:
    """The keys of an instance's services."""

    authority: ec.EllipticCurvePrivateKey = field(default_factory=make_key)
    certificates: ec.EllipticCurvePrivateKey = field(default_factory=make_key)
    signatures: ec.EllipticCurvePrivateKey = field(default_factory=make_key)

    def trusted_root(self) -> str:
        """Return the file that makes others trust this instance."""
        document = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [_described(self.signatures)],
            "ctlogs": [_described(self.certificates)],
            "timestampAuthorities": [],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "example.org", "commonName": "example"},
                    "uri": "https://ca.example.org",
                    "certChain": {"certificates": [{"rawBytes": text(_der(self._root()))}]},
                    "validFor": {"start": BEGUN.isoformat().replace("+00:00", "Z")},
                }
            ],
        }
        return json.dumps(document)

    def sign(self, content: bytes, identity: str, issuer: str) -> str:
        """Return the bundle of an identity's signature."""
        key = make_key()
        certificate = self._certify(key, identity, issuer)
        digest = hashlib.sha256(content).digest()
        signature = key.sign(digest, ec.ECDSA(utils.Prehashed(HASH)))
        document = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": text(_der(certificate))},
                "tlogEntries": [self._log(digest, signature, certificate)],
            },
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": text(digest)},
                "signature": text(signature),
            },
        }
        return json.dumps(document)

    def _root(self) -> x509.Certificate:
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        return (
            _certificate(self.authority, BEGUN + timedelta(days=3650))
            .add_extension(constraints, critical=True)
            .add_extension(usages("key_cert_sign", "crl_sign"), critical=True)
            .sign(self.authority, HASH)
        )

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str
    ) -> x509.Certificate:
        """Return a certificate of ten minutes that names the identity."""
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public_key())
        unlogged = (
            _certificate(key, SIGNED + timedelta(minutes=5), begun=SIGNED - timedelta(minutes=5))
            .add_extension(names, critical=True)
            .add_extension(authority, critical=False)
            .add_extension(usages("digital_signature"), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(
                x509.UnrecognizedExtension(ISSUER_EXTENSION, issuer.encode()), critical=False
            )
        )
        content = unlogged.sign(self.authority, HASH).tbs_certificate_bytes
        stamp = self._timestamp(content)
        value = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        octets = (
            b"\x04"
            + (bytes([len(value)]) if len(value) < 128 else bytes([0x81, len(value)]))
            + value
        )
        extension = x509.UnrecognizedExtension(
            x509.PrecertificateSignedCertificateTimestamps.oid, octets
        )
        return unlogged.add_extension(extension, critical=False).sign(self.authority, HASH)

    def _timestamp(self, content: bytes) -> bytes:
        """Return the certificate log's timestamp of a certificate's content (RFC 6962, 3.2)."""
        moment = struct.pack("!Q", int(SIGNED.timestamp() * 1000))
        issuer = hashlib.sha256(public(self.authority)).digest()
        entry = b"\0\1" + issuer + len(content).to_bytes(3, "big") + content
        signature = self.certificates.sign(b"\0\0" + moment + entry + b"\0\0", ec.ECDSA(HASH))
        log = hashlib.sha256(public(self.certificates)).digest()
        return b"\0" + log + moment + b"\0\0\4\3" + struct.pack("!H", len(signature)) + signature

    def _log(
        self, digest: bytes, signature: bytes, certificate: x509.Certificate
    ) -> dict[str, Any]:
        """Return the first entry of the signature log."""
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        body = _canonical(
            {
                "apiVersion": "0.0.1",
                "kind": "hashedrekord",
                "spec": {
                    "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
                    "signature": {"content": text(signature), "publicKey": {"content": text(pem)}},
                },
            }
        )
        log = hashlib.sha256(public(self.signatures)).digest()
        moment = int(SIGNED.timestamp())
        promise = {"body": text(body), "integratedTime": moment, "logID": log.hex(), "logIndex": 0}
        root = hashlib.sha256(b"\0" + body).digest()  # of a log that has this entry only
        note = f"{LOG} - 1\n1\n{text(root)}\n"
        signed_note = text(log[:4] + self.signatures.sign(note.encode(), ec.ECDSA(HASH)))
        return {
            "logIndex": "0",
            "logId": {"keyId": text(log)},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(moment),
            "inclusionPromise": {
                "signedEntryTimestamp": text(
                    self.signatures.sign(_canonical(promise), ec.ECDSA(HASH))
                )
            },
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": text(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 {LOG} {signed_note}\n"},
            },
            "canonicalizedBody": text(body),
        }


def _certificate(
    key: ec.EllipticCurvePrivateKey, until: datetime, *, begun: datetime = BEGUN
) -> x509.CertificateBuilder:
    """Return a certificate of a key by the authority, which is not signed yet."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example")])
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .issuer_name(name)
        .subject_name(name if begun == BEGUN else x509.Name([]))
        .public_key(key.public_key())
        .not_valid_before(begun)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _canonical(document: dict[str, Any]) -> bytes:
    """Return RFC 8785's form of a document without fractions."""
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()


def _described(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """Return a log as a trusted root describes it."""
    return {
        "baseUrl": f"https://{LOG}",
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": text(public(key)),
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": {"start": BEGUN.isoformat().replace("+00:00", "Z")},
        },
        "logId": {"keyId": text(hashlib.sha256(public(key)).digest())},
    }
