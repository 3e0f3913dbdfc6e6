# Packer bakes with vmprovision: packer build -var bake_file=FILE ci/packer/golden.pkr.hcl
#
# After a QEMU builder, the same as a post-processor injects the agent into what it has made:
#   post-processor "shell-local" { command = "vmprovision inject output/disk.qcow2" }

variable "bake_file" {
  type    = string
  default = "debian.toml"
}

source "null" "golden" {
  communicator = "none"
}

build {
  sources = ["source.null.golden"]

  provisioner "shell-local" {
    command = "vmprovision bake '${var.bake_file}'"
  }
}
