//! What the machine must have: root, kernel features, Debian's packages.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::run;

/// A program that the test bed runs, and the Debian package that holds it.
const PROGRAMS: &[(&str, &str)] = &[
    ("runc", "runc"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("ipset", "ipset"),
    ("conntrack", "conntrack"),
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("ping", "iputils-ping"),
    ("modprobe", "kmod"),
    ("mmdebstrap", "mmdebstrap"),
    ("buildah", "buildah"),
    ("busybox", "busybox-static"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("mount", "mount"),
    ("gcc", "gcc"),
    ("xz", "xz-utils"),
    ("git", "git"),
    ("tar", "tar"),
];

/// Where Debian puts programs; root's PATH may lack the sbin directories.
const DIRECTORIES: &[&str] = &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Where buildah looks for programs that it calls.
const HELPERS: &[&str] =
    &["/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman", "/usr/lib/podman"];
/// What buildah won't make a container without, and the minor version from which on it is asked for. 1.28 was seen to
/// do without and 1.39 not to; where it is asked for in vain it does no harm.
const NETAVARK: (&str, u32) = ("netavark", 35);

/// Refuses anyone but root: namespaces, mounts and containerd need it.
pub fn root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("not root: namespaces, mounts and containerd need it; run the same command with sudo");
    }
    Ok(())
}

/// Makes sure that all is there: installs missing packages on Debian and Ubuntu, and otherwise ends with one
/// error that lists everything that is missing.
pub fn ensure() -> Result<()> {
    root()?;
    let missing = missing_packages();
    if !missing.is_empty() {
        if !Path::new("/etc/debian_version").exists() {
            bail!("missing programs; install what your distribution calls: {}", missing.join(" "));
        }
        eprintln!("requirements: installing {}", missing.join(" "));
        install(&missing)?;
        let still = missing_packages();
        if !still.is_empty() {
            bail!("still missing after apt-get install: {}", still.join(" "));
        }
    }
    let lacking = lacking_features();
    if !lacking.is_empty() {
        bail!("this kernel or machine lacks: {}", lacking.join("; "));
    }
    Ok(())
}

/// The Go toolchain's `go`, wherever it is.
pub fn go() -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .map(Path::new)
        .chain([Path::new("/usr/local/go/bin")])
        .map(|directory| directory.join("go"))
        .find(|path| path.is_file())
        .context(
            "no Go toolchain: put `go` (1.26.8 or later) on PATH; the test bed's parts are built with it",
        )
}

fn missing_packages() -> Vec<&'static str> {
    let mut packages: Vec<&'static str> = PROGRAMS
        .iter()
        .filter(|(program, _)| !DIRECTORIES.iter().any(|d| Path::new(d).join(program).exists()))
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    let (helper, since) = NETAVARK;
    let there = HELPERS.iter().any(|directory| Path::new(directory).join(helper).exists());
    if !there
        && run::output(&mut run::command("buildah", &["--version"]))
            .map_or(true, |text| buildah_is(&text, since))
    {
        packages.push(helper);
    }
    packages
}

/// Whether `buildah --version` says at least 1.`minor`: what can't be read is taken for new.
fn buildah_is(version: &str, minor: u32) -> bool {
    let number = version.split_whitespace().nth(2).unwrap_or_default();
    let mut parts = number.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(this))) => (major, this) >= (1, minor),
        _ => true,
    }
}

fn install(packages: &[&str]) -> Result<()> {
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]).args(args);
        run::output(&mut command).map(drop)
    };
    apt(&["update"])?;
    // No service of these packages may start: the test bed starts its own programs per node.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists();
    if ours {
        fs::write(policy, "#!/bin/sh\nexit 101\n")?;
        run::output(&mut run::command("chmod", &["+x", "/usr/sbin/policy-rc.d"]))?;
    }
    let mut args = vec!["install", "--no-install-recommends"];
    args.extend(packages);
    let installed = apt(&args);
    if ours {
        fs::remove_file(policy)?;
    }
    installed
}

fn lacking_features() -> Vec<String> {
    let mut lacking = Vec::new();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay")
        && !modprobe("overlay")
    {
        lacking.push("the overlay file system (modprobe overlay)".to_owned());
    }
    if !Path::new("/proc/sys/net/bridge").exists() && !modprobe("br_netfilter") {
        lacking.push("br_netfilter (modprobe br_netfilter)".to_owned());
    }
    // Tried rather than looked up: built in or module, allowed or not, the answer is the same.
    for kind in ["bridge", "veth", "vxlan"] {
        let link = match kind {
            "vxlan" => "ip link add fm0 type vxlan id 1 dstport 8472",
            "veth" => "ip link add fm0 type veth peer name fm1",
            _ => "ip link add fm0 type bridge",
        };
        if run::output(&mut run::command("unshare", &["--net", "sh", "-c", link])).is_err() {
            lacking.push(format!("network devices of type {kind}, or the right to make network namespaces"));
        }
    }
    lacking
}

fn modprobe(module: &str) -> bool {
    run::output(&mut run::command("modprobe", &[module])).is_ok()
}

#[cfg(test)]
mod tests {
    use super::buildah_is;

    #[test]
    fn a_buildah_that_wants_netavark_is_told_by_its_version() {
        assert!(!buildah_is("buildah version 1.28.2 (image-spec 1.0.2, runtime-spec 1.0.2-dev)", 35));
        assert!(buildah_is("buildah version 1.39.3 (image-spec 1.1.0, runtime-spec 1.2.0)", 35));
        assert!(buildah_is("buildah version 2.0.0", 35));
        assert!(buildah_is("", 35));
    }
}
