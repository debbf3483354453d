//! Files that survive a power cut: temporary file, fsync, rename, fsync of the directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// An operation on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {path}")]
pub struct Error {
    action: &'static str,
    path: String,
    source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error { action, path, source }
}

/// The whole text; `None` when the file isn't there.
pub fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// Permission bits of a file.
pub fn mode(path: &Path) -> Result<u32, Error> {
    Ok(fs::metadata(path).map_err(failed("stat", path))?.permissions().mode() & 0o7777)
}

/// Replaces a file in one instant, durably. The temporary file is in the same directory (a rename across directories
/// looks to a watcher like a mere creation, which containerd ignores) and hidden behind an extension no runtime loads.
pub fn write(path: &Path, text: &[u8], mode: u32) -> Result<(), Error> {
    replace(path, text, mode, true)?;
    sync_directory(&parent(path))
}

/// Replaces a file in one instant for all who read it; the disk follows when it likes.
pub fn put(path: &Path, text: &[u8], mode: u32) -> Result<(), Error> {
    replace(path, text, mode, false)
}

fn replace(path: &Path, text: &[u8], mode: u32, durably: bool) -> Result<(), Error> {
    let directory = parent(path);
    let temporary = directory.join(format!(
        ".{}.flannel-migration",
        path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    ));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .map_err(failed("create", &temporary))?;
    // The mode given to open is subject to the umask, and ignored for a file that was left behind.
    file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed("chmod", &temporary))?;
    file.write_all(text).map_err(failed("write", &temporary))?;
    if durably {
        file.sync_all().map_err(failed("fsync", &temporary))?;
    }
    fs::rename(&temporary, path).map_err(failed("rename a temporary file to", path))
}

/// Removes a file durably; it is no error when it isn't there.
pub fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Ok(()) => sync_directory(&parent(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

/// Makes a directory and what is above it, private to root.
pub fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(failed("create the directory", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed("chmod", path))
}

/// What a container gets when it removes a directory of the host that is mounted into it: busy, or read-only where the
/// container's own root is. Such a directory stays, empty.
fn is_mount_point(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::ReadOnlyFilesystem)
}

/// Empties a directory and removes it; it is no error when it isn't there. A mount point stays, empty.
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    for name in names(path)? {
        let entry = path.join(name);
        let directory = fs::symlink_metadata(&entry).is_ok_and(|metadata| metadata.is_dir());
        let removed = if directory { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
        removed.map_err(failed("remove", &entry))?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound && !is_mount_point(&error) => {
            Err(failed("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Moves a file or a directory's files, also to another file system; it is no error when it isn't there. What is at the destination
/// already stays unless it has the same name.
pub fn move_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let metadata = match fs::symlink_metadata(from) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("stat", from)(error)),
    };
    if metadata.is_dir() {
        fs::create_dir_all(to).map_err(failed("create the directory", to))?;
        fs::set_permissions(to, metadata.permissions()).map_err(failed("chmod", to))?;
        for name in names(from)? {
            move_tree(&from.join(&name), &to.join(&name))?;
        }
        return match fs::remove_dir(from) {
            Err(error) if !is_mount_point(&error) => Err(failed("remove", from)(error)),
            _ => Ok(()),
        };
    }
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            let text = fs::read(from).map_err(failed("read", from))?;
            write(to, &text, metadata.permissions().mode() & 0o7777)?;
            fs::remove_file(from).map_err(failed("remove", from))
        }
        other => other.map_err(failed("move", from)),
    }
}

/// Names in a directory, sorted; none when the directory isn't there.
pub fn names(directory: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("list", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("list", directory))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn parent(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

fn sync_directory(directory: &Path) -> Result<(), Error> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(failed("fsync the directory", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_leaves_no_temporary_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("10-x.conflist");
        write(&path, b"one", 0o644).unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(mode(&path).unwrap(), 0o600);
        assert_eq!(names(directory.path()).unwrap(), ["10-x.conflist"]);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }
}
