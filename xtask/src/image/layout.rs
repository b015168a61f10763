//! An OCI image layout in a tar archive, for `podman load`, `ctr images import` and `skopeo copy oci-archive:`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::architecture::Architecture;

/// The owner of files, an unprivileged one: the programs only have to be readable.
const OWNER: u64 = 65532;

/// A file of the image.
pub(crate) struct Entry {
    /// Without the leading slash.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) bytes: Vec<u8>,
}

pub(crate) struct Image {
    pub(super) name: String,
    pub(super) architecture: Architecture,
    /// Seconds since 1970.
    pub(super) created: u64,
    pub(super) entries: Vec<Entry>,
}

/// A blob of the layout, stored under its digest.
struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        Self { digest: hex(&bytes), bytes }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{}", self.digest),
            "size": self.bytes.len(),
        })
    }
}

impl Image {
    /// The digest by which registries know the image.
    pub(super) fn digest(&self) -> Result<String> {
        let [.., manifest] = self.blobs()?;
        Ok(format!("sha256:{}", manifest.digest))
    }

    pub(super) fn write(&self, archive: &Path) -> Result<()> {
        if let Some(folder) = archive.parent() {
            fs::create_dir_all(folder)?;
        }
        let blobs = self.blobs()?;
        let mut manifest = blobs[2].descriptor("manifest.v1+json");
        manifest["annotations"] = json!({
            "org.opencontainers.image.ref.name": self.name,
            "io.containerd.image.name": self.name,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        let mut tar = tar::Builder::new(File::create(archive)?);
        self.append(
            &mut tar,
            "oci-layout",
            0o644,
            json!({"imageLayoutVersion": "1.0.0"}).to_string().as_bytes(),
        )?;
        self.append(&mut tar, "index.json", 0o644, index.to_string().as_bytes())?;
        for blob in &blobs {
            self.append(&mut tar, &format!("blobs/sha256/{}", blob.digest), 0o644, &blob.bytes)?;
        }
        tar.into_inner()?.flush()?;
        Ok(())
    }

    /// Layer, configuration, manifest.
    fn blobs(&self) -> Result<[Blob; 3]> {
        let tar = self.layer()?;
        let content = hex(&tar);
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
        gzip.write_all(&tar)?;
        let layer = Blob::new(gzip.finish()?);
        let configuration = Blob::json(&json!({
            "created": rfc3339(self.created),
            "architecture": self.architecture.in_packages(),
            "os": "linux",
            "config": {
                "Entrypoint": ["/redirect"],
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": "ambient-redirect",
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                    "org.opencontainers.image.licenses": "Apache-2.0 AND (MIT OR GPL-2.0-only)",
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{content}")]},
            "history": [{"created": rfc3339(self.created), "created_by": "cargo xtask image"}],
        }));
        let manifest = Blob::json(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": configuration.descriptor("config.v1+json"),
            "layers": [layer.descriptor("layer.v1.tar+gzip")],
        }));
        Ok([layer, configuration, manifest])
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut folders = Vec::new();
        for Entry { path, mode, bytes } in &self.entries {
            if let Some((folder, _)) = path.rsplit_once('/')
                && !folders.contains(&folder)
            {
                folders.push(folder);
                let mut header = self.header(0o755, 0);
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, format!("{folder}/"), std::io::empty())?;
            }
            self.append(&mut tar, path, *mode, bytes)?;
        }
        Ok(tar.into_inner()?)
    }

    fn append(&self, tar: &mut tar::Builder<impl Write>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        Ok(tar.append_data(&mut self.header(mode, bytes.len() as u64), path, bytes)?)
    }

    fn header(&self, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_uid(OWNER);
        header.set_gid(OWNER);
        header.set_mtime(self.created);
        header.set_size(size);
        header
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A time in UTC, in the format of images and bills of materials.
pub(super) fn rfc3339(seconds: u64) -> String {
    let (days, second) = ((seconds / 86400) as i64, seconds % 86400);
    // Days of the proleptic Gregorian calendar; eras of 400 years that begin in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: &[u8]) -> Image {
        let entry = Entry { path: "licenses/TEXT".into(), mode: 0o644, bytes: bytes.into() };
        Image {
            name: "localhost/x:1".into(),
            architecture: Architecture::HOST,
            created: 1_000_000_000,
            entries: vec![entry],
        }
    }

    #[test]
    fn times_are_read_as_date_prints_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_000_000_000, "2001-09-09T01:46:40Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

    #[test]
    fn the_same_files_are_the_same_image_and_others_are_not() {
        assert_eq!(image(b"a").digest().unwrap(), image(b"a").digest().unwrap());
        assert_ne!(image(b"a").digest().unwrap(), image(b"b").digest().unwrap());
    }

    #[test]
    fn files_belong_to_nobody_and_have_the_commit_s_time() {
        let layer = image(b"text").layer().unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let mut paths = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (OWNER, OWNER));
            assert_eq!(header.mtime().unwrap(), 1_000_000_000);
            paths.push(entry.path().unwrap().display().to_string());
        }
        assert_eq!(paths, ["licenses/", "licenses/TEXT"]);
    }
}
