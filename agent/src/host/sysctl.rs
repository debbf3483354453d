//! Kernel settings. Those without an interface in their name go through the `sysctl` crate; it turns every dot into a
//! slash, so that `vxlan.calico` or `flannel.1` can't be named to it, and settings of interfaces are read and written here.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sysctl::Sysctl as _;

/// A setting that couldn't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("can't read the kernel setting {0}")]
    Read(String, #[source] std::io::Error),
    /// Writing failed.
    #[error("can't set the kernel setting {0} to {1}")]
    Write(String, String, #[source] std::io::Error),
    /// Reading through the crate failed.
    #[error("can't read the kernel setting {0}")]
    Named(String, #[source] sysctl::SysctlError),
}

/// Value of a setting without interface in its name, such as `net.ipv4.conf.all.rp_filter`.
pub fn named(name: &str) -> Result<String, Error> {
    sysctl::Ctl::new(name)
        .and_then(|setting| setting.value_string())
        .map(|value| value.trim().to_owned())
        .map_err(|error| Error::Named(name.to_owned(), error))
}

/// Which table a setting of an interface is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Table {
    /// `net.ipv4.conf`
    Conf4,
    /// `net.ipv4.neigh`
    Neigh4,
    /// `net.ipv6.conf`
    Conf6,
    /// `net.ipv6.neigh`
    Neigh6,
}

impl Table {
    const fn path(self) -> &'static str {
        match self {
            Self::Conf4 => "ipv4/conf",
            Self::Neigh4 => "ipv4/neigh",
            Self::Conf6 => "ipv6/conf",
            Self::Neigh6 => "ipv6/neigh",
        }
    }
}

fn path(table: Table, interface: &str, key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(table.path()).join(interface).join(key)
}

/// An interface's setting, in the network namespace of the calling thread.
pub fn read(table: Table, interface: &str, key: &str) -> Result<String, Error> {
    let path = path(table, interface, key);
    std::fs::read_to_string(&path)
        .map(|value| value.trim().to_owned())
        .map_err(|error| Error::Read(path.display().to_string(), error))
}

/// Sets an interface's setting, if it differs.
pub fn write(table: Table, interface: &str, key: &str, value: &str) -> Result<(), Error> {
    if read(table, interface, key).is_ok_and(|old| old == value) {
        return Ok(());
    }
    let path = path(table, interface, key);
    std::fs::write(&path, value)
        .map_err(|error| Error::Write(path.display().to_string(), value.to_owned(), error))
}
