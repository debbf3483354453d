//! Tables that flannel (`EnableNFTables`) and Felix (`nftablesMode`) have of their own in nftables, and what is in them. Tables of
//! iptables-nft are never touched here.

use serde::{Deserialize, Serialize};

use crate::host::command::{self, Error};
use crate::host::tables::{Family, Name};

/// The tables that flannel makes; both are always made.
pub const FLANNEL: [Name; 2] = [Name(Family::Ip, "flannel-ipv4"), Name(Family::Ip6, "flannel-ipv6")];

/// The table in which Felix filters IPv4.
pub const FELIX_IPV4: Name = Name(Family::Ip, "calico");

/// The tables that Felix makes: those of its nftables mode, and that of ARP, which it has in iptables mode as well (Calico 3.32).
pub const FELIX: [Name; 3] = [FELIX_IPV4, Name(Family::Ip6, "calico"), Name(Family::Arp, "calico-arp")];

/// A table as `nft` prints it, which is also how `nft -f` reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// `ip` or `ip6`.
    pub family: String,
    /// Name.
    pub name: String,
    /// The table's whole text.
    pub text: String,
}

/// A table with all that is in it.
pub fn list(name: Name) -> Result<Table, Error> {
    let text = command::run("nft", &["list", "table", name.0.as_str(), name.1], "")?;
    Ok(Table { family: name.0.as_str().into(), name: name.1.into(), text })
}

/// A table's chains and rules in JSON, without the elements of its sets.
pub fn rules(name: Name) -> Result<String, Error> {
    command::run("nft", &["--json", "--terse", "list", "table", name.0.as_str(), name.1], "")
}

/// Puts captured tables back in place of what is there of them.
pub fn restore(tables: &[Table]) -> Result<(), Error> {
    if tables.is_empty() {
        return Ok(());
    }
    // Making the table first lets its deletion succeed whether it was there or not; all of it is one transaction.
    let parts: Vec<String> = tables
        .iter()
        .map(|table| {
            let name = format!("{} {}", table.family, table.name);
            format!("table {name} {{}}\ndelete table {name}\n{}\n", table.text)
        })
        .collect();
    command::run("nft", &["-f", "-"], &format!("{}\n", parts.join("\n"))).map(drop)
}
