"""The manifest: what an artifact is, what it was made from, and the digest of every file it has.

Belongs here: the manifest's fields, its bytes and their verification. Not here: where it lies (artifacts.py).
"""

import hashlib
import json

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from less_assets.errors import CorruptArtifactError, StaleArtifactError

# Raised when layout or meaning of stored artifacts changes. Part of every fingerprint: artifacts of another version
# are recognised, never read, never overwritten, and made again beside the old ones.
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


def canonical_json(value: object) -> bytes:
    """The one JSON encoding of a value: sorted keys, no spaces, UTF-8. NaN and infinity raise ValueError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


class StoredFile(BaseModel):
    """Size and SHA-256 (hex) of one file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    digest: str


class Manifest(BaseModel):
    """What an artifact is and what it was made from; equal work gives equal bytes, so it holds no time and no host.

    Attributes:
        kind: The asset that makes such artifacts, for example `train_gradients`.
        key: Axis folder, for example `gradients/train/epoch-1/dolly-00000`.
        fingerprint: Hash of the settings and inputs that could change the numbers; names the folder.
        settings: Those settings.
        inputs: Data version of each upstream artifact.
        data_version: Version of the content; readers downstream record it.
        files: Every data file, by POSIX name relative to the folder.
        summary: Counts and figures worth showing without opening the data.
        format_version: Layout of manifest and data files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    key: str
    fingerprint: str
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    data_version: str
    files: dict[str, StoredFile] = Field(default_factory=dict)
    summary: dict[str, JsonValue] = Field(default_factory=dict)
    format_version: int = Field(default_factory=lambda: FORMAT_VERSION)

    def to_bytes(self) -> bytes:
        """Readable JSON with the digest of its own content, so that no byte of it can change unnoticed."""
        content = self.model_dump(mode="json")
        sealed = {**content, "manifest_digest": hashlib.sha256(canonical_json(content)).hexdigest()}
        text = json.dumps(sealed, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str, fix: str | None = None) -> "Manifest":
        """Read and verify a manifest.

        Raises:
            CorruptArtifactError: The bytes are not those that were written.
            StaleArtifactError: A different version of less-assets wrote it.
        """
        try:
            content = json.loads(data)
            digest = content.pop("manifest_digest")
            whole = digest == hashlib.sha256(canonical_json(content)).hexdigest()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            whole, content = False, {}
        if not whole:
            raise CorruptArtifactError("The manifest is damaged.", where=where, fix=fix)
        if content.get("format_version") != FORMAT_VERSION:
            raise StaleArtifactError(
                f"The artifact has format {content.get('format_version')}; this version of less-assets reads "
                f"format {FORMAT_VERSION}.",
                where=where,
                fix=fix,
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise CorruptArtifactError(
                f"The manifest is not one: {error.error_count()} wrong fields.", where=where, fix=fix
            ) from error


def content_version(files: dict[str, StoredFile]) -> str:
    """Data version of a set of files: 32 hex digits that change when any name or byte does."""
    return hashlib.sha256(canonical_json({name: file.digest for name, file in files.items()})).hexdigest()[:32]
