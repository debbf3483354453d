//! Rules in iptables' tables. Both variants (nft and legacy) and both families are separate worlds; flannel's rules can be
//! in any of them. What `iptables-save` prints is read, and what is to change is one `iptables-restore --noflush`, which
//! is atomic per table.

use std::fmt::Write as _;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::host::command::{self, Error};

/// Commands of all the worlds of rules, without the `-save` and `-restore` at their end.
pub const WORLDS: [&str; 4] = ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"];

/// Rules of one owner in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// `nat`, `filter`, ...
    pub table: String,
    /// The owner's own chains.
    pub chains: Vec<String>,
    /// Rules in the owner's chains, as `-A CHAIN ...`.
    pub inside: Vec<String>,
    /// The owner's rules in others' chains, as `-A CHAIN ...`.
    pub outside: Vec<String>,
}

impl Rules {
    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.inside.is_empty() && self.outside.is_empty()
    }
}

/// Whose rules.
#[derive(Clone, Debug)]
pub enum Owner {
    /// flannel: its chains since v0.20; before that, rules that only their exact text tells.
    Flannel {
        /// The cluster's pod networks.
        networks: Vec<IpNet>,
        /// This node's part of them.
        subnets: Vec<IpNet>,
    },
    /// Felix.
    Calico,
}

impl Owner {
    fn owns_chain(&self, chain: &str) -> bool {
        match self {
            Self::Flannel { .. } => matches!(chain, "FLANNEL-POSTRTG" | "FLANNEL-FWD"),
            Self::Calico => chain.starts_with("cali-"),
        }
    }

    fn owns_rule(&self, words: &[String]) -> bool {
        let after = |option: &str| {
            words.iter().position(|word| word == option).and_then(|at| words.get(at + 1)).map(String::as_str)
        };
        let comment = after("--comment");
        if after("-j").or_else(|| after("-g")).is_some_and(|target| self.owns_chain(target)) {
            return true;
        }
        match self {
            Self::Calico => comment.is_some_and(|comment| comment.starts_with("cali:")),
            Self::Flannel { networks, subnets } => {
                matches!(comment, Some("flanneld masq" | "flannel masq" | "flanneld forward"))
                    || (comment.is_none() && chainless(words, networks, subnets))
            }
        }
    }
}

// v0.5.6 to v0.19.2 without comments: the exact rules that flannel builds from its network and this node's part of it.
fn chainless(words: &[String], networks: &[IpNet], subnets: &[IpNet]) -> bool {
    let rule = words
        .iter()
        .filter(|word| *word != "--random-fully")
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(" ");
    networks.iter().any(|network| {
        let multicast = if network.addr().is_ipv4() { "224.0.0.0/4" } else { "ff00::/8" };
        rule == format!("-A POSTROUTING -s {network} -d {network} -j RETURN")
            || rule == format!("-A POSTROUTING -s {network} ! -d {multicast} -j MASQUERADE")
            || rule == format!("-A POSTROUTING ! -s {network} -d {network} -j MASQUERADE")
            || rule == format!("-A FORWARD -s {network} -j ACCEPT")
            || rule == format!("-A FORWARD -d {network} -j ACCEPT")
            || subnets
                .iter()
                .any(|subnet| rule == format!("-A POSTROUTING ! -s {network} -d {subnet} -j RETURN"))
    })
}

/// The owner's rules in what `iptables-save` printed.
#[must_use]
pub fn owned(save: &str, owner: &Owner) -> Vec<Rules> {
    let mut found = Vec::new();
    let mut table = Rules::default();
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = Rules { table: name.to_owned(), ..Rules::default() };
        } else if let Some(chain) = line.strip_prefix(':') {
            let chain = chain.split(' ').next().unwrap_or_default();
            if owner.owns_chain(chain) {
                table.chains.push(chain.to_owned());
            }
        } else if line.starts_with("-A ") {
            let words = words(line);
            if words.get(1).is_some_and(|chain| owner.owns_chain(chain)) {
                table.inside.push(line.to_owned());
            } else if owner.owns_rule(&words) {
                table.outside.push(line.to_owned());
            }
        } else if line == "COMMIT" {
            let table = std::mem::take(&mut table);
            if !table.is_empty() {
                found.push(table);
            }
        }
    }
    found
}

/// Words of a rule as a shell would see them; `iptables-save` quotes only with `"` and escapes with `\`.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut begun) = (String::new(), false, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                begun = true;
            }
            '\\' => word.extend(characters.next()),
            ' ' if !quoted => {
                if begun || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            other => word.push(other),
        }
    }
    if begun || !word.is_empty() {
        words.push(word);
    }
    words
}

/// What `iptables-restore --noflush` needs to remove the rules: jumps first, then the chains they lead to.
#[must_use]
pub fn removal(rules: &[Rules]) -> String {
    let mut script = String::new();
    for table in rules {
        let _ = writeln!(script, "*{}", table.table);
        for rule in &table.outside {
            let _ = writeln!(script, "-D {}", rule.trim_start_matches("-A "));
        }
        for chain in &table.chains {
            let _ = writeln!(script, "-F {chain}");
        }
        for chain in &table.chains {
            let _ = writeln!(script, "-X {chain}");
        }
        script += "COMMIT\n";
    }
    script
}

/// What `iptables-restore --noflush` needs to put captured rules back, given what is there of them now.
#[must_use]
pub fn restoration(captured: &[Rules], present: &[Rules]) -> String {
    let mut script = String::new();
    for table in captured {
        let there = present.iter().find(|other| other.table == table.table).cloned().unwrap_or_default();
        if there == *table {
            continue;
        }
        let _ = writeln!(script, "*{}", table.table);
        for chain in &table.chains {
            // Declaring a chain that exists empties it, so that its rules can be written anew.
            let _ = writeln!(script, ":{chain} - [0:0]");
        }
        for rule in table.outside.iter().filter(|rule| !there.outside.contains(rule)).chain(&table.inside) {
            let _ = writeln!(script, "{rule}");
        }
        script += "COMMIT\n";
    }
    script
}

/// All rules of one world; `None` when its program isn't installed.
pub fn save(world: &str) -> Result<Option<String>, Error> {
    match command::run(&format!("{world}-save"), &[], "") {
        Ok(text) => Ok(Some(text)),
        Err(Error::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Applies a script without touching anything it doesn't mention.
pub fn restore(world: &str, script: &str) -> Result<(), Error> {
    if script.is_empty() {
        return Ok(());
    }
    command::run(&format!("{world}-restore"), &["--noflush", "--wait", "10"], script).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVE: &str = r#"# Generated by iptables-nft-save
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
:cali-FORWARD - [0:0]
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -j cali-FORWARD
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FORWARD -s 10.244.0.0/16 -j ACCEPT
-A FORWARD -s 10.0.0.0/8 -j ACCEPT
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.1.0/24 -j RETURN
-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.2.0/24 -j RETURN
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
COMMIT
"#;

    fn flannel() -> Owner {
        Owner::Flannel {
            networks: vec!["10.244.0.0/16".parse().unwrap()],
            subnets: vec!["10.244.1.0/24".parse().unwrap()],
        }
    }

    #[test]
    fn flannels_rules_are_found_with_and_without_chains_and_nothing_else() {
        assert_eq!(
            removal(&owned(SAVE, &flannel())),
            r#"*filter
-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-D FORWARD -s 10.244.0.0/16 -j ACCEPT
-F FLANNEL-FWD
-X FLANNEL-FWD
COMMIT
*nat
-D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-D POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-D POSTROUTING ! -s 10.244.0.0/16 -d 10.244.1.0/24 -j RETURN
-F FLANNEL-POSTRTG
-X FLANNEL-POSTRTG
COMMIT
"#
        );
    }

    #[test]
    fn calicos_rules_are_found_by_chain_and_comment() {
        let rules = owned(SAVE, &Owner::Calico);
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].chains, ["cali-FORWARD"]);
        assert_eq!(rules[0].outside.len(), 1);
    }

    #[test]
    fn what_is_still_there_is_not_put_back_twice() {
        let captured = owned(SAVE, &flannel());
        assert_eq!(restoration(&captured, &captured), "");
        let script = restoration(&captured, &[]);
        assert!(script.contains(":FLANNEL-FWD - [0:0]\n"));
        assert_eq!(owned(&script, &flannel()).len(), 2);
        let mut half = captured.clone();
        half[0].inside.clear();
        let script = restoration(&captured, &half);
        assert!(!script.contains("-A FORWARD"), "{script}");
        assert!(script.contains("-A FLANNEL-FWD"), "{script}");
    }

    #[test]
    fn quoted_words_are_one_word() {
        assert_eq!(
            words(r#"-A X --comment "a \"b\" c" -j Y"#),
            ["-A", "X", "--comment", "a \"b\" c", "-j", "Y"]
        );
    }
}
