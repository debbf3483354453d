//! flannel's own nftables tables (`EnableNFTables`). Tables of iptables-nft are never touched here.

use serde::{Deserialize, Serialize};

use crate::host::command::{self, Error};

/// Family and name of the tables that flannel makes; both are always made.
pub const FLANNEL: [(&str, &str); 2] = [("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")];

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

/// flannel's tables; none when `nft` isn't installed.
pub fn flannel() -> Result<Vec<Table>, Error> {
    let list = list()?;
    let mut tables = Vec::new();
    for (family, name) in FLANNEL {
        if is_there(&list, &format!("{family} {name}")) {
            let text = command::run("nft", &["list", "table", family, name], "")?;
            tables.push(Table { family: family.into(), name: name.into(), text });
        }
    }
    Ok(tables)
}

/// Removes tables, all or none.
pub fn delete(tables: &[Table]) -> Result<(), Error> {
    if tables.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        tables.iter().map(|table| format!("delete table {} {}", table.family, table.name)).collect();
    command::run("nft", &["-f", "-"], &format!("{}\n", lines.join("\n"))).map(drop)
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
