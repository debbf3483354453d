//! Connections of the node itself.

use std::collections::BTreeSet;
use std::net::IpAddr;

use procfs::net::{TcpState, UdpState};
use procfs::process::Process;

/// Whether one comes from, or goes to, one of these local addresses.
#[must_use]
pub fn any_from(addresses: &[IpAddr]) -> bool {
    !peers_of(addresses).is_empty()
}

/// The other ends of connections of these local addresses, `address:port`. What can't be read is taken as none.
#[must_use]
pub fn peers_of(addresses: &[IpAddr]) -> Vec<String> {
    // The thread's, not the process's: the calling thread may be in another network namespace.
    let own = format!("/proc/self/task/{}", nix::unistd::gettid());
    let Ok(own) = Process::new_with_root(own.into()) else { return Vec::new() };
    let mut peers = BTreeSet::new();
    for entry in own.tcp().into_iter().chain(own.tcp6()).flatten() {
        // Those that only wait for stragglers lose nothing.
        let open = !matches!(entry.state, TcpState::TimeWait | TcpState::Close | TcpState::Listen);
        if open && addresses.contains(&entry.local_address.ip().to_canonical()) {
            peers.insert(entry.remote_address.to_string());
        }
    }
    for entry in own.udp().into_iter().chain(own.udp6()).flatten() {
        let connected = entry.state == UdpState::Established;
        if connected && addresses.contains(&entry.local_address.ip().to_canonical()) {
            peers.insert(entry.remote_address.to_string());
        }
    }
    peers.into_iter().collect()
}
