//! What the kernel says of processes. Names in it are anybody's.

use super::Input;
use pageferry_common::PageRange;
use pageferry_common::proc::process::start_time;
use pageferry_sender::freeze::procs::{field_in, is_vfork, state_in};
use pageferry_sender::target::descriptors::writes_past_page_tables;
use pageferry_sender::target::files::executable;
use pageferry_sender::target::process::{children_faults_in, nested_pids_in};
use pageferry_sender::target::smaps::program_for;
use pageferry_sender::target::vma::{self, Class, KernelMounts};
use std::cell::LazyCell;

thread_local! {
    static MOUNTS: LazyCell<KernelMounts> = const {
        LazyCell::new(|| KernelMounts::probe().expect("the kernel has memfds"))
    };
}

/// The first byte says what the others are: a whole file, or a name in one.
pub fn proc(input: &[u8]) {
    let mut input = Input(input);
    let what = input.byte();
    let bytes = input.0;
    let text = String::from_utf8_lossy(bytes);
    match what % 8 {
        0 => whole_maps(bytes),
        1 => file_in_maps(bytes),
        2 => name_in_stat(&text),
        3 => {
            let _ = children_faults_in(&text, &text);
            assert!(
                nested_pids_in(&text).is_ok_and(|pids| !pids.is_empty())
                    || nested_pids_in(&text).is_err()
            );
            let value = field_in(&text, "TracerPid");
            assert!(value.is_none_or(|value| !value.contains('\n')));
        }
        4 => name_in_status(&text),
        5 => {
            let _ = start_time(&text);
            let _ = state_in(&text);
            let _ = is_vfork(&text);
        }
        6 => drop(writes_past_page_tables(&text)),
        _ => drop(program_for(bytes)),
    }
}

fn whole_maps(bytes: &[u8]) {
    let vdso = vma::vdso(bytes);
    for line in String::from_utf8_lossy(bytes).lines() {
        if let Some(path) = executable(line) {
            assert!(path.starts_with('/'));
        }
    }
    let Ok(vmas) = MOUNTS.with(|mounts| vma::parse(bytes, mounts)) else {
        return;
    };
    if let Some(vdso) = vdso {
        let of_vdso = |vma: &vma::Vma| vma.range == vdso && vma.class == Class::Whole;
        assert!(vmas.iter().any(of_vdso));
    }
}

/// Whatever a file is called, its mapping is a file's.
fn file_in_maps(name: &[u8]) {
    // The kernel writes a line's end otherwise.
    let name: Vec<u8> = name.iter().copied().filter(|&byte| byte != b'\n').collect();
    let line = [
        b"1000-3000 r-xp 00002000 fe:01 77                 /tmp/",
        &name[..],
        b"\n5000-6000 r-xp 00000000 00:00 0 [vdso]\n",
    ];
    let text = line.concat();
    let vmas = MOUNTS.with(|mounts| vma::parse(&text, mounts));
    let [file, vdso] = &vmas.expect("it is as the kernel writes it")[..] else {
        panic!("these are two mappings");
    };
    assert_eq!(file.class, Class::Private { hugetlb: false });
    assert!(file.file_code && file.inode == 77 && file.offset == 0x2000);
    assert_eq!(vdso.class, Class::Whole);
    assert_eq!(vma::vdso(&text), PageRange::from_bounds(0x5000, 0x6000));
}

/// Whatever a process is called, it is what it is.
fn name_in_stat(name: &str) {
    let numbers: Vec<String> = (0..50).map(|number: u64| number.to_string()).collect();
    let stat = format!("9 ({name}) T {}\n", numbers.join(" "));
    assert_eq!(state_in(&stat), Some('T'));
    assert_eq!(start_time(&stat), Some(18));
    let status = "SigIgn:\t0000000000000000\n";
    // The 9th and the 11th behind the name, of which the state is the 0th.
    let faults = children_faults_in(status, &stat);
    assert_eq!(faults.expect("all is there"), Some(7 + 9));
}

/// As the kernel writes it, a name has no line's end in it.
fn name_in_status(name: &str) {
    let name = name.replace('\n', "\\n");
    let status = format!("Name:\t{name}\nNStgid:\t70\t7\nSigIgn:\t0000000000010000\n");
    assert_eq!(nested_pids_in(&status).expect("they are there"), [70, 7]);
    assert_eq!(field_in(&status, "NStgid"), Some("70\t7"));
    assert_eq!(
        children_faults_in(&status, "").expect("it ignores them"),
        None
    );
}
