//! Container images as docker-archives: layers, configurations and one manifest.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A file of a layer.
#[derive(Debug, Clone)]
pub enum Content {
    /// A program or other file copied from the machine, executable.
    Program(PathBuf),
    /// An executable text.
    Script(&'static str),
    /// A symbolic link to this target.
    Link(&'static str),
    /// An empty directory that every user may write to.
    Directory,
}

/// A layer: files by their absolute path in the image. Directories come by themselves.
///
/// Never `/bin` or `/sbin`: a layer with such a directory hides the base's merged-usr link.
pub type Files = BTreeMap<&'static str, Content>;

/// One image: its layers from the bottom up, as (directory of finished layer tars, digest) from [`layer`].
#[derive(Debug, Clone)]
pub struct Image {
    /// Full names with tags.
    pub names: Vec<String>,
    /// Layers, bottom first.
    pub layers: Vec<Layer>,
    /// Entry point; empty for none.
    pub entrypoint: Vec<&'static str>,
    /// The user that its programs run as; root when none is named.
    pub user: Option<u32>,
}

impl Image {
    /// An image with one name and no entry point.
    #[must_use]
    pub fn new(name: &str, layers: Vec<Layer>) -> Self {
        Self { names: vec![name.to_owned()], layers, entrypoint: vec![], user: None }
    }
}

/// A finished layer on disk.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The uncompressed tar.
    pub path: PathBuf,
    /// SHA-256 of it, hexadecimal.
    pub digest: String,
}

impl Layer {
    /// The layer that an existing tar makes.
    pub fn of(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("can't open {}", path.display()))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(buffer.get(..read).unwrap_or_default());
        }
        Ok(Self { path: path.to_owned(), digest: hex::encode(hash.finalize()) })
    }
}

/// Writes the tar of `files` to `path`.
pub fn layer(path: &Path, files: &Files) -> Result<Layer> {
    let mut tar = tar::Builder::new(File::create(path)?);
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        // Fixed, so that the same content is the same layer.
        header.set_mtime(0);
        header
    };
    for (name, content) in files {
        let name = name.trim_start_matches('/');
        match content {
            Content::Program(source) => {
                let mut file = File::open(source).with_context(|| format!("no {}", source.display()))?;
                let size = file.metadata()?.len();
                tar.append_data(&mut header(tar::EntryType::Regular, 0o755, size), name, &mut file)?;
            }
            Content::Script(text) => {
                let size = u64::try_from(text.len())?;
                tar.append_data(&mut header(tar::EntryType::Regular, 0o755, size), name, text.as_bytes())?;
            }
            Content::Link(target) => {
                tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), name, target)?;
            }
            Content::Directory => {
                let mut header = header(tar::EntryType::Directory, 0o777, 0);
                tar.append_data(&mut header, format!("{name}/"), std::io::empty())?;
            }
        }
    }
    tar.into_inner()?.flush()?;
    Layer::of(path)
}

/// Writes `images` as one docker-archive to `path`; a layer that several share is in it once.
pub fn write(path: &Path, images: &[Image]) -> Result<()> {
    let mut tar = tar::Builder::new(File::create(path)?);
    let mut append = |name: &str, size: u64, data: &mut dyn Read| -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(size);
        tar.append_data(&mut header, name, data)?;
        Ok(())
    };
    let mut written: Vec<&str> = Vec::new();
    let mut manifest = Vec::new();
    for image in images {
        for layer in &image.layers {
            if !written.contains(&layer.digest.as_str()) {
                written.push(&layer.digest);
                let size = fs::metadata(&layer.path)?.len();
                append(&format!("{}.tar", layer.digest), size, &mut File::open(&layer.path)?)?;
            }
        }
        let diff_ids: Vec<String> =
            image.layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect();
        let config = serde_json::to_vec(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Env": ["PATH=/opt/cni/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Entrypoint": image.entrypoint,
                "User": image.user.map(|user| user.to_string()).unwrap_or_default(),
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            // Builders refuse to build on an image whose history doesn't account for its layers.
            "history": image.layers.iter().map(|_| json!({ "created_by": "test bed" })).collect::<Vec<_>>(),
        }))?;
        let name = format!("{}.json", hex::encode(Sha256::digest(&config)));
        append(&name, u64::try_from(config.len())?, &mut config.as_slice())?;
        let layers: Vec<String> = image.layers.iter().map(|layer| format!("{}.tar", layer.digest)).collect();
        manifest.push(json!({ "Config": name, "RepoTags": image.names, "Layers": layers }));
    }
    let manifest = serde_json::to_vec(&manifest)?;
    append("manifest.json", u64::try_from(manifest.len())?, &mut manifest.as_slice())?;
    tar.into_inner()?.flush()?;
    Ok(())
}

/// Bytes of an image in an OCI layout that holds no other: configuration and layers, as they are there.
pub fn compressed(layout: &Path) -> Result<u64> {
    let read = |path: &Path| -> Result<Value> {
        let text = fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    };
    let index = read(&layout.join("index.json"))?;
    let digest = index.pointer("/manifests/0/digest").and_then(Value::as_str);
    let manifest = digest.context("the layout names no manifest")?.replacen(':', "/", 1);
    let manifest = read(&layout.join("blobs").join(manifest))?;
    let layers = manifest.get("layers").and_then(Value::as_array).context("the manifest names no layers")?;
    layers
        .iter()
        .chain(manifest.get("config"))
        .map(|blob| blob.get("size").and_then(Value::as_u64).context("a blob without a size"))
        .sum()
}

/// Bytes of the layers in a docker-archive, which are not compressed.
pub fn unpacked(archive: &Path) -> Result<u64> {
    let mut tar = tar::Archive::new(File::open(archive)?);
    let mut all = 0;
    for entry in tar.entries()? {
        let entry = entry?;
        let layer = entry.path()?.extension().is_some_and(|extension| extension == "tar");
        if layer && entry.header().entry_type().is_file() {
            all += entry.size();
        }
    }
    Ok(all)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_as_large_as_its_layers_and_its_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = directory.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |path: &Path, value: Value| fs::write(path, value.to_string()).unwrap();
        put(&directory.path().join("index.json"), json!({ "manifests": [{ "digest": "sha256:m" }] }));
        put(
            &blobs.join("m"),
            json!({ "config": { "size": 1 }, "layers": [{ "size": 20 }, { "size": 300 }] }),
        );
        assert_eq!(compressed(directory.path()).unwrap(), 321);
        put(&blobs.join("m"), json!({ "config": {}, "layers": [] }));
        assert!(compressed(directory.path()).is_err());
    }

    #[test]
    fn layers_are_counted_once_and_configurations_are_none() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        fs::write(&program, [7; 5000]).unwrap();
        let files = Files::from([("/program", Content::Program(program))]);
        let layer = layer(&directory.path().join("layer"), &files).unwrap();
        let size = fs::metadata(&layer.path).unwrap().len();
        let image = |name| Image::new(name, vec![layer.clone()]);
        let archive = directory.path().join("archive.tar");
        write(&archive, &[image("a"), image("b")]).unwrap();
        assert_eq!(unpacked(&archive).unwrap(), size);
    }
}
