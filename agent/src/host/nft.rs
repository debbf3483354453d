//! Tables that flannel (`EnableNFTables`) and Felix (`nftablesMode`) have of their own in nftables. Tables of iptables-nft are never touched
//! here.
//!
//! Felix's image brings an `nft` that may be newer than the agent's. So tables are found and deleted by name, for which nothing in them need
//! be understood.

use serde::{Deserialize, Serialize};

use crate::host::command::{self, Error};

/// Family and name of a table.
pub type Name = (&'static str, &'static str);

/// The tables that flannel makes; both are always made.
pub const FLANNEL: [Name; 2] = [("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")];

/// The table in which Felix filters IPv4.
pub const FELIX_IPV4: Name = ("ip", "calico");

/// The tables that Felix makes: those of its nftables mode, and that of ARP, which it has in iptables mode as well (Calico 3.32).
pub const FELIX: [Name; 3] = [FELIX_IPV4, ("ip6", "calico"), ("arp", "calico-arp")];

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

fn is_there(list: &str, table: &str) -> bool {
    list.lines().any(|line| line.trim() == format!("table {table}"))
}

// Of a family that the kernel doesn't have there is no table; without `nft` there is none at all.
fn list() -> Result<String, Error> {
    match command::run("nft", &["list", "tables"], "") {
        Err(Error::Missing(_)) => Ok(String::new()),
        listed => listed,
    }
}

/// Those of the tables that are there; none when `nft` isn't installed.
pub fn present(names: &[Name]) -> Result<Vec<Name>, Error> {
    let list = list()?;
    Ok(names.iter().copied().filter(|(family, name)| is_there(&list, &format!("{family} {name}"))).collect())
}

/// flannel's tables with all that is in them.
pub fn flannel() -> Result<Vec<Table>, Error> {
    let mut tables = Vec::new();
    for (family, name) in present(&FLANNEL)? {
        let text = command::run("nft", &["list", "table", family, name], "")?;
        tables.push(Table { family: family.into(), name: name.into(), text });
    }
    Ok(tables)
}

/// A table's chains and rules in JSON, without the elements of its sets; `None` when there is no such table.
pub fn rules(table: Name) -> Result<Option<String>, Error> {
    let Some((family, name)) = present(&[table])?.pop() else { return Ok(None) };
    command::run("nft", &["--json", "--terse", "list", "table", family, name], "").map(Some)
}

/// Removes tables that are there, all or none.
pub fn delete(tables: &[Name]) -> Result<(), Error> {
    if tables.is_empty() {
        return Ok(());
    }
    let script: String =
        tables.iter().flat_map(|(family, name)| ["delete table ", family, " ", name, "\n"]).collect();
    command::run("nft", &["-f", "-"], &script).map(drop)
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
