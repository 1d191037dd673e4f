//! Capabilities of this process (`man 7 capabilities`).

use super::status;
use nix::unistd::geteuid;
use std::fs;

/// Number and name of a capability.
pub type Capability = (u8, &'static str);

/// Capabilities that CRIU needs to dump any process.
pub const TO_DUMP: [Capability; 1] = [(21, "CAP_SYS_ADMIN")];

/// Capabilities that CRIU needs to restore any process.
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

/// Returns what this process lacks to run CRIU: user ID 0 and each of these capabilities.
#[must_use]
pub fn lacking(needed: &[Capability]) -> Vec<&'static str> {
    // If /proc does not report the capabilities, CRIU reports what it lacks itself.
    let status = fs::read("/proc/self/status").unwrap_or_default();
    let effective = status::mask(&status, "CapEff").unwrap_or(u64::MAX);
    let user = (!geteuid().is_root()).then_some("user ID 0");
    user.into_iter().chain(missing(effective, needed)).collect()
}

/// Returns the names of the needed capabilities that are not in the mask of effective ones.
fn missing(effective: u64, needed: &[Capability]) -> impl Iterator<Item = &'static str> {
    let missing =
        move |&(number, name): &Capability| (effective >> number & 1 == 0).then_some(name);
    needed.iter().filter_map(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let missing: Vec<_> = missing(0x40141, &TO_RESTORE).collect();
        let names = [
            "CAP_SETUID",
            "CAP_NET_ADMIN",
            "CAP_SYS_ADMIN",
            "CAP_SYS_TIME",
        ];
        assert_eq!(missing, names);
    }
}
