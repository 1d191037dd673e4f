//! What this process may do beyond its user's own (`man 7 capabilities`).

use nix::unistd::geteuid;
use std::fs;

/// A capability: its number and its name.
pub type Capability = (u8, &'static str);

/// What CRIU dumps with, whosever processes.
pub const TO_DUMP: [Capability; 1] = [(21, "CAP_SYS_ADMIN")];

/// What CRIU restores with.
pub const TO_RESTORE: [Capability; 8] = [
    (0, "CAP_CHOWN"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (8, "CAP_SETPCAP"),
    (12, "CAP_NET_ADMIN"),
    (18, "CAP_SYS_CHROOT"),
    (21, "CAP_SYS_ADMIN"),
    (25, "CAP_SYS_TIME"),
];

/// What this process lacks of what CRIU takes: to be root, and these capabilities.
#[must_use]
pub fn lacking(wanted: &[Capability]) -> Vec<&'static str> {
    // Where /proc does not tell, CRIU will.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = effective(&status).unwrap_or(u64::MAX);
    let user = (!geteuid().is_root()).then_some("user ID 0");
    user.into_iter().chain(missing(effective, wanted)).collect()
}

fn missing(effective: u64, wanted: &[Capability]) -> impl Iterator<Item = &'static str> {
    let missing =
        move |&(number, name): &Capability| (effective >> number & 1 == 0).then_some(name);
    wanted.iter().filter_map(missing)
}

fn effective(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let status = "Name:\tx\nCapPrm:\tffffffffffffffff\nCapEff:\t0000000000040141\n";
        let effective = effective(status).unwrap();
        let missing: Vec<_> = missing(effective, &TO_RESTORE).collect();
        let names = [
            "CAP_SETUID",
            "CAP_NET_ADMIN",
            "CAP_SYS_ADMIN",
            "CAP_SYS_TIME",
        ];
        assert_eq!(missing, names);
    }
}
