//! What is built once: a directory per content key under `$XDG_CACHE_HOME/flannel-migration`.
//!
//! An entry is made in a directory of its own and renamed into place when it is whole, under a lock: an
//! interrupted build leaves nothing that looks finished, and two builds at once make it once.

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// `$XDG_CACHE_HOME/flannel-migration`, or `~/.cache/flannel-migration`.
#[must_use]
pub fn root() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("flannel-migration")
}

/// The key of what is made from `inputs`: 16 hex digits of their SHA-256.
#[must_use]
pub fn key<'a>(inputs: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        // The length first, so that moving a byte from one input to the next is another key.
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    hex::encode(hash.finalize()).chars().take(16).collect()
}

/// The directory `kind-key`, made by `build` when it isn't there yet.
///
/// `build` gets a directory that stays across interrupted tries, so it may leave there what the next try
/// can use. Entries of the same kind with other keys are removed once the new one is whole.
pub fn entry(kind: &str, key: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = root();
    let path = root.join(format!("{kind}-{key}"));
    if path.is_dir() {
        return Ok(path);
    }
    fs::create_dir_all(&root).with_context(|| format!("can't create {}", root.display()))?;
    let _lock = lock(&root.join(format!("{kind}.lock")))?;
    if path.is_dir() {
        return Ok(path);
    }
    let unfinished = root.join(format!("{kind}-{key}.unfinished"));
    fs::create_dir_all(&unfinished).with_context(|| format!("can't create {}", unfinished.display()))?;
    build(&unfinished).with_context(|| format!("{kind} not built"))?;
    fs::rename(&unfinished, &path).with_context(|| format!("can't rename {}", unfinished.display()))?;
    remove_others(&root, kind, &path)?;
    Ok(path)
}

/// Waits for the exclusive lock on `path`, which lasts until the value is dropped or the process ends.
pub fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::create(path).with_context(|| format!("can't create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
            eprintln!("waiting for another process that holds {}", path.display());
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("can't lock {}", path.display()))
        }
        Err((_, error)) => Err(error).with_context(|| format!("can't lock {}", path.display())),
    }
}

fn remove_others(root: &Path, kind: &str, keep: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let of_kind = name.strip_prefix(kind).and_then(|rest| rest.strip_prefix('-'));
        // Exactly "kind-<16 hex>" with or without ".unfinished": "images" must not take "images-x" along.
        let is_entry = of_kind.is_some_and(|rest| {
            let key = rest.strip_suffix(".unfinished").unwrap_or(rest);
            key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
        if is_entry && path != keep {
            fs::remove_dir_all(&path).with_context(|| format!("can't remove {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_where_inputs_end() {
        assert_eq!(key([&b"ab"[..], b"c"]).len(), 16);
        assert_ne!(key([&b"ab"[..], b"c"]), key([&b"a"[..], b"bc"]));
    }

    #[test]
    fn only_entries_of_the_same_kind_make_room_for_a_new_one() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            "a-0123456789abcdef",
            "a-fedcba9876543210.unfinished",
            "a-b-0123456789abcdef",
            "a-1111111111111111",
        ] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        remove_others(root.path(), "a", &root.path().join("a-1111111111111111")).unwrap();
        let mut left: Vec<_> = fs::read_dir(root.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["a-1111111111111111", "a-b-0123456789abcdef"]);
    }
}
