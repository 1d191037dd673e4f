//! `/proc/PID/cgroup`, and the mounts of the cgroup hierarchies in `/proc/self/mountinfo`.

/// Returns where the whole cgroup v2 hierarchy is mounted for writing, by the content of `mountinfo`.
#[must_use]
pub fn v2_mount(mountinfo: &str) -> Option<&str> {
    mounts(mountinfo).find_map(|mount| {
        let writable = mount.options.split(',').any(|option| option == "rw");
        (mount.kind.starts_with("cgroup2 ") && writable).then_some(mount.point)
    })
}

/// Returns where the whole cgroup v1 hierarchy of a controller is mounted, by the content of `mountinfo`.
#[must_use]
pub fn v1_mount<'a>(mountinfo: &'a str, controller: &str) -> Option<&'a str> {
    mounts(mountinfo).find_map(|mount| {
        let mut fields = mount.kind.split(' ');
        let is_v1 = fields.next() == Some("cgroup");
        let mut options = fields.next_back()?.split(',');
        (is_v1 && options.any(|option| option == controller)).then_some(mount.point)
    })
}

/// A mount of the root of a file system.
struct Mount<'a> {
    point: &'a str,
    options: &'a str,
    /// Type, source and options of the file system.
    kind: &'a str,
}

fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point, options) = (fields.next()?, fields.next()?, fields.next()?);
        // Characters that would have to be unescaped are not used for cgroups.
        let plain = root == "/" && !point.contains('\\');
        plain.then_some(Mount {
            point,
            options,
            kind,
        })
    })
}

/// Returns the path in the cgroup v2 hierarchy in the content of a `cgroup` file.
#[must_use]
pub fn v2_path(cgroups: &str) -> Option<&str> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Returns the path in the cgroup v1 hierarchy of a controller in the content of a `cgroup` file.
#[must_use]
pub fn v1_path<'a>(cgroups: &'a str, controller: &str) -> Option<&'a str> {
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let mut controllers = fields.next()?.split(',');
        controllers
            .any(|name| name == controller)
            .then(|| fields.next())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        31 30 0:27 / /cg/freezer rw,relatime shared:5 - cgroup cgroup rw,freezer\n\
        32 30 0:28 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 30 0:29 /sub /cg/part rw - cgroup2 cgroup2 rw\n\
        34 30 0:29 / /cg/ro ro,nosuid - cgroup2 cgroup2 rw\n\
        35 30 0:29 / /cg/v2 rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const CGROUPS: &str = "9:name=systemd:/a\n6:freezer:/b:c\n1:cpu,cpuacct:/d\n0::/e\n";

    #[test]
    fn whole_hierarchies_are_found() {
        assert_eq!(v2_mount(MOUNTS), Some("/cg/v2"));
        assert_eq!(v1_mount(MOUNTS, "freezer"), Some("/cg/freezer"));
        assert_eq!(v1_mount(MOUNTS, "cpuacct"), Some("/cg/cpu"));
        assert_eq!(v1_mount(MOUNTS, "memory"), None);
        assert_eq!(v2_mount(""), None);
    }

    #[test]
    fn paths_are_those_of_their_hierarchy() {
        assert_eq!(v2_path(CGROUPS), Some("/e"));
        assert_eq!(v1_path(CGROUPS, "freezer"), Some("/b:c"));
        assert_eq!(v1_path(CGROUPS, "cpuacct"), Some("/d"));
        assert_eq!(v1_path(CGROUPS, "systemd"), None);
        assert_eq!(v2_path("garbage"), None);
    }
}
